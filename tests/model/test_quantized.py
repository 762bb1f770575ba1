"""Weights in 4 bits: the layers compute with what their codes stand for, and only adapters learn. bitsandbytes is optional."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eagle_model.lora import LoraLinear, QuantizedLoraLinear, add_lora, is_adapter, load_adapter, merge_checked, quantize, save_adapter
from eagle_model.quantized import QuantizedLinear, dequantize, parameter_count
from tests.support.models import tiny_model
from tests.support.packs import make_pack


@pytest.fixture
def pack():
    ids = torch.cat([torch.full((8,), 100), torch.randint(0, 99, (20,), generator=torch.Generator().manual_seed(0))])
    tiles = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return make_pack(ids, [14, 14], tiles=tiles, targets=ids.roll(-1), denominator=28.0)


def layer(width=96, out=80, bias=True):
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias)


def adapted():
    """A model whose decoder and tower are in 4 bits, the decoder with adapters that are not zero."""
    model = tiny_model()
    torch.manual_seed(1)
    names = add_lora(model, "language", rank=2, alpha=4.0)
    for name in names:
        nn.init.normal_(model.get_submodule(name).lora_B, std=0.3)
    assert set(names) <= set(quantize(model, "language"))
    quantize(model, "vision")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    return model


def test_without_bitsandbytes_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match=r"4-bit weights need bitsandbytes .*pip install 'eagle-model\[qlora\]'"):
        QuantizedLinear(layer())


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_its_rounded_weight(dtype):
    pytest.importorskip("bitsandbytes")
    plain = layer()
    made = QuantizedLinear(plain)
    error = (made.weight - plain.weight).norm() / plain.weight.norm()
    assert 0.02 < error < 0.12  # NF4 of a uniform weight
    x = torch.randn(3, 5, 96, dtype=dtype, requires_grad=True)
    y = made(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    reference = x.detach().double().requires_grad_()
    expected = F.linear(reference, made.weight.double(), plain.bias.double())
    expected.square().sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), expected, atol=limit, rtol=limit)
    torch.testing.assert_close(x.grad.double(), reference.grad, atol=limit * reference.grad.abs().max().item(), rtol=limit)
    assert [name for name, _ in made.named_parameters()] == ["bias"]


@pytest.mark.integration
def test_a_weight_takes_a_little_more_than_four_bits():
    pytest.importorskip("bitsandbytes")
    made = QuantizedLinear(layer(1024, 512, bias=False))
    bits = 8 * sum(buffer.numel() * buffer.element_size() for buffer in made.buffers()) / (1024 * 512)
    assert 4.1 < bits < 4.2
    assert parameter_count(made) == 1024 * 512


@pytest.mark.integration
@pytest.mark.parametrize("width", [96, 100])
def test_empty_layers_take_the_values_of_others(width):
    pytest.importorskip("bitsandbytes")
    made = QuantizedLinear(layer(width))
    again = QuantizedLinear(nn.Linear(width, 80), empty=True)
    again.load_state_dict(made.state_dict())
    x = torch.randn(4, width)
    assert torch.equal(again(x), made(x))


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_only_adapters_learn(pack, mode):
    pytest.importorskip("bitsandbytes")
    model = adapted()
    model.set_activation_checkpointing(mode)
    model(pack).loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.abs().max() > 0}
    assert learned == {name for name, _ in model.named_parameters() if is_adapter(name)}


@pytest.mark.integration
def test_gradients_are_those_of_plain_layers_with_the_rounded_weights(pack):
    pytest.importorskip("bitsandbytes")
    model, plain = adapted(), adapted()
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizedLoraLinear):
            parent, _, child = name.rpartition(".")
            made = LoraLinear(module.dequantized(), module.rank, module.alpha)
            made.lora_A, made.lora_B = module.lora_A, module.lora_B
            setattr(plain.get_submodule(parent), child, made)
    dequantize(plain)
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    for one in (model, plain):
        one(pack).loss.backward()
    found = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, found[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.integration
def test_merged_is_a_plain_model_with_the_same_logits(pack):
    pytest.importorskip("bitsandbytes")
    model = adapted()
    expected = model(pack).loss
    assert merge_checked(model) < 1e-5
    torch.testing.assert_close(model(pack).loss, expected, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == set(tiny_model().state_dict())
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


@pytest.mark.integration
def test_adapters_come_before_rounding(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny_model()
    add_lora(model, "language", rank=2, alpha=4.0)
    save_adapter(model, tmp_path)
    rounded = tiny_model()
    quantize(rounded, "language")
    with pytest.raises(ValueError, match="is a QuantizedLinear; load the adapter before weights are rounded to 4 bits"):
        load_adapter(rounded, tmp_path)
    with pytest.raises(ValueError, match="is a QuantizedLinear; an adapter goes on a plain linear layer"):
        add_lora(rounded, "language", rank=2, alpha=4.0)
