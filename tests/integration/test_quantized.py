"""bitsandbytes and accelerate: quantised and offloaded modules run through their own forward."""

import pytest
import torch

pytest.importorskip("accelerate")
from eagle_model import EagleForConditionalGeneration

OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights(folder, make_batch, bits):
    """Logits stay near those of the full weights, the answer can be generated, and every quantised layer is used."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    model = EagleForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    quantized = [name for name, module in model.named_modules() if isinstance(module, kind)]
    assert sum("language_model.model.layers" in name for name in quantized) == 2 * 7
    used = set()
    for name in quantized:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: used.add(name))
    batch = make_batch()
    got, expected = model(**batch), EagleForConditionalGeneration.from_pretrained(folder).eval()(**batch)
    assert used == set(quantized)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=0.1)
    assert got.loss.item() != expected.loss.item()
    assert model.generate(**inputs_of(batch), **OPTIONS).shape == (2, 18)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_quantized_weights(folder, make_batch, bits):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    model = EagleForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")
    model = peft.prepare_model_for_kbit_training(model)
    adapters = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, adapters).train()
    model(**make_batch()).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)]
    assert missing == []


def test_attention_inputs_move_with_the_layer():
    """With a model that is split over devices, accelerate moves what a layer gets to the device of its weights."""
    from accelerate.utils import send_to_device

    from eagle_model.language.attention import AttentionInputs

    inputs = AttentionInputs(torch.arange(3), torch.ones(4), rows=torch.arange(3), shape=(1, 3))
    (moved,) = send_to_device((inputs,), "meta")
    assert {value.device.type for value in (moved.positions, moved.inv_freq, moved.rows)} == {"meta"}
    assert (moved.mask, moved.shape) == (None, (1, 3))


@pytest.mark.parametrize("room", [20_000, 120_000, 400_000])
def test_weights_on_disk(folder, make_batch, tmp_path, room):
    """Layers, norms, embeddings and the tower on disk: loss and answers are those of the whole model in memory."""
    model = EagleForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path, offload_state_dict=True
    ).eval()
    assert "disk" in set(model.hf_device_map.values())
    whole = EagleForConditionalGeneration.from_pretrained(folder).eval()
    batch = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, whole(**batch).loss)
    assert torch.equal(model.generate(**inputs_of(batch), **OPTIONS), whole.generate(**inputs_of(batch), **OPTIONS))
