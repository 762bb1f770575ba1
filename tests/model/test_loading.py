"""`load_model` gives what `from_pretrained` gives, and says what a folder lacks."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_model import EagleForConditionalGeneration
from eagle_model.loading import load_model
from tests.support.models import tiny_model
from tests.support.packs import make_pack

CPU = torch.device("cpu")


def saved(folder, *, tied=False):
    tiny_model(text_config={"tie_word_embeddings": tied}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_model_of_from_pretrained(tmp_path, tied, dtype):
    folder = saved(tmp_path, tied=tied)
    ours, theirs = load_model(folder, device=CPU, dtype=dtype), EagleForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) and tensor.dtype == dtype for name, tensor in ours.state_dict().items())
    buffers = dict(theirs.named_buffers())
    assert dict(ours.named_buffers()).keys() == buffers.keys() != set()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    assert not ours.training
    ids = torch.cat([torch.full((4,), 100), torch.arange(20)])
    tiles = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pack = make_pack(ids, tiles=tiles)
    assert torch.equal(ours(pack).logits, theirs(pack).logits)


def test_a_folder_without_a_head_is_tied(tmp_path):
    folder = saved(tmp_path)
    path = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}, path, metadata={"format": "pt"})
    model = load_model(folder, device=CPU, dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_does_not_fit_is_named(tmp_path):
    folder = saved(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["mlp1.9.weight"] = tensors.pop("mlp1.1.weight")
    tensors["mlp1.0.bias"] = tensors["mlp1.0.bias"][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mlp1\.0\.bias \(is .*mlp1\.9\.weight \(unknown\), mlp1\.1\.weight \(missing\)"):
        load_model(folder, device=CPU, dtype=torch.float32)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="it is not a checkpoint folder"):
        load_model(folder, device=CPU, dtype=torch.float32)
