"""A new model from two checkpoints: folders, or names on the hub."""

import shutil
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolLM3Config,
)

from eagle_model import EagleProcessor, from_pretrained_parts
from eagle_model.hub import checkpoint_folder
from eagle_model.pretrained import grow_vocabulary, resize_positions
from tests.support.models import tiny_model
from tests.support.packs import make_pack

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    SiglipModel(SiglipConfig(vision_config=VISION, text_config=text | {"projection_size": 24})).save_pretrained(root / "siglip")
    SiglipVisionModel(SiglipVisionConfig(**(VISION | {"image_size": 32}))).save_pretrained(root / "vision")
    for name, config in (
        ("qwen", Qwen2Config(**TEXT, vocab_size=64, tie_word_embeddings=True)),
        ("llama", LlamaConfig(**TEXT, vocab_size=400)),
        ("smollm3", SmolLM3Config(**TEXT, vocab_size=400, pad_token_id=0, no_rope_layer_interval=2)),
    ):
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / name, max_shard_size="20KB")
    return root


@pytest.mark.parametrize("language", ["qwen", "llama", "smollm3"])
@pytest.mark.parametrize("vision", ["siglip", "vision"])
def test_a_new_model(folders, small_tokenizer, vision, language):
    model = from_pretrained_parts(folders / vision, folders / language, small_tokenizer, image_size=32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folders / language)
    tower = SiglipVisionModel.from_pretrained(folders / vision)
    ids = torch.arange(50)
    ours = model(make_pack(ids, image=-1)).logits
    torch.testing.assert_close(ours[:, :64], theirs(ids[None]).logits[0, :, :64], atol=1e-5, rtol=1e-5)
    assert ours.shape[1] == max(theirs.config.vocab_size, len(small_tokenizer))
    pixels = torch.rand(1, 3, 32, 32)
    if vision == "vision":
        torch.testing.assert_close(model.vision_model(pixels), tower(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    processor = EagleProcessor.for_config(small_tokenizer, model.config)
    inputs = processor(text="Hi", images=[torch.zeros(3, 40, 40, dtype=torch.uint8)])
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert (model.config.select_layer, model.config.use_thumbnail, model.config.tile_size) == (-1, True, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_of_the_vocabulary_are_the_mean(tied):
    model = tiny_model(text_config={"tie_word_embeddings": tied})
    rows = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    grow_vocabulary(model, 100)  # nothing to do
    grow_vocabulary(model, 123)
    for layer, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), rows):
        assert torch.equal(layer.weight[:120], old)
        torch.testing.assert_close(layer.weight[120:], old.mean(0).expand(3, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_positions():
    d = torch.arange(9.0).view(9, 1).expand(9, 4)
    assert torch.equal(resize_positions(d, 9), d)
    larger = resize_positions(d, 36)
    assert larger.shape == (36, 4)
    assert larger.mean().item() == pytest.approx(d.mean().item(), abs=1e-4)
    with pytest.raises(ValueError, match="squares"):
        resize_positions(d, 10)


def test_missing_tensors_are_named(folders, small_tokenizer, tmp_path):
    shutil.copy(folders / "vision" / "config.json", tmp_path)
    tensors = load_file(folders / "vision" / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.1.mlp.fc1.weight" in name))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are in neither.*layers\.1\.mlp\.fc1\.weight"):
        from_pretrained_parts(tmp_path, folders / "qwen", small_tokenizer)


def test_what_is_not_a_part_is_refused(folders, small_tokenizer, tmp_path):
    for vision, language, words in (
        ("qwen", "qwen", r"qwen holds a model of type 'qwen2', expected one of siglip"),
        ("vision", "siglip", r"text_config: the language model 'SiglipModel' is not supported; supported are Qwen2"),
    ):
        with pytest.raises(ValueError, match=words):
            from_pretrained_parts(folders / vision, folders / language, small_tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no config\.json$"):
        from_pretrained_parts(tmp_path, folders / "qwen", small_tokenizer)
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"weights\.gguf is a GGUF file, which can be the language model only"):
        from_pretrained_parts(tmp_path, folders / "qwen", small_tokenizer)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; check the path"):
        from_pretrained_parts(tmp_path / "nowhere", folders / "qwen", small_tokenizer)


@pytest.fixture
def hub_cache(folders, tmp_path, monkeypatch):
    """A Hugging Face cache that holds `owner/siglip`, on a machine without a network."""
    commit = "a" * 40
    model = tmp_path / "models--owner--siglip"
    shutil.copytree(folders / "vision", model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return model / "snapshots" / commit


def test_hub_names(hub_cache, folders, small_tokenizer, monkeypatch):
    assert checkpoint_folder("owner/siglip") == hub_cache
    assert checkpoint_folder(hub_cache) == checkpoint_folder(str(hub_cache)) == hub_cache
    model = from_pretrained_parts("owner/siglip", folders / "qwen", small_tokenizer)
    assert model.config.tile_size == 32
    with pytest.raises(FileNotFoundError, match=r"owner/other is not a folder here.*cannot be reached.*hf download owner/other"):
        from_pretrained_parts("owner/siglip", "owner/other", small_tokenizer)

    def not_found(*_, **__):
        raise RepositoryNotFoundError("404", response=Mock())

    monkeypatch.setattr("huggingface_hub.snapshot_download", not_found)
    with pytest.raises(FileNotFoundError, match="nor a model that the Hugging Face hub shows"):
        checkpoint_folder("owner/other")
