"""Products of 8-bit floats in the model: which layers, what they share, activation checkpointing, adapters, and what is refused."""

import pytest
import torch
from torch import nn

from eagle_kernels import Kept, OffloadEngine, Training, plan_memory, use_implementation
from eagle_model import preset
from eagle_model.float8 import Float8Linear, apply_together
from eagle_model.layers import linear_layers, replace_layer
from eagle_model.lora import Float8LoraLinear, add_lora, is_adapter, merge_lora, use_float8
from eagle_model.memory import decoder_shape, vision_shape
from eagle_model.quantized import QuantizedLinear
from tests.support.models import assert_same_bits, loss_and_gradients, tiny_config, tiny_model
from tests.support.packs import image_pack

LAYERS = 3
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 64}
KEPT = [Kept(), Kept(1), Kept(3), Kept(3, 1), Kept(3, 2, 1), Kept(3, 3, 3)]
RECIPES = ("rowwise", "rowwise_with_gw_hp")


def make(recipe=None, parts=("language",), **sizes):
    model = tiny_model(tiny_config(text_config=SIZES | sizes)).train()
    for part in parts if recipe else ():
        use_float8(model, part, recipe)
    return model


def pack():
    return image_pack((40, 21))  # 61 tokens, which is not a multiple of 16


def step(model, mode="keep", device="cpu", **kept):
    model.set_activation_checkpointing(mode, **kept)
    return loss_and_gradients(model, pack().to(device))


def test_weights_keep_their_names_and_values_and_the_head_is_left_out():
    plain, model = make(), make("rowwise")
    assert {name: tuple(one.shape) for name, one in plain.named_parameters()} == {
        name: tuple(one.shape) for name, one in model.named_parameters()
    }
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in plain.state_dict().items())
    assert {type(layer) for layer in linear_layers(model, "language").values()} == {Float8Linear}
    assert {type(layer) for layer in linear_layers(model, "vision").values()} == {nn.Linear}
    assert not isinstance(model.language_model.lm_head, Float8Linear)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_close_to_those_without_rounding(recipe):
    expected, found = step(make()), step(make(recipe, ("vision", "connector", "language")))
    assert found[0] != expected[0]
    assert abs(found[0] - expected[0]) < 0.02 * expected[0]
    assert set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        if gradient.ndim > 1:
            assert torch.cosine_similarity(found[1][name].flatten(), gradient.flatten(), dim=0) > 0.93, name
    whole = [torch.cat([one.flatten() for one in gradients.values()]) for gradients in (found[1], expected[1])]
    assert torch.cosine_similarity(*whole, dim=0) > 0.98


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    torch.use_deterministic_algorithms(request.param == "cuda")
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_policies_give_the_gradients_of_keep_to_the_bit(recipe, device):
    model = make(recipe, ("vision", "connector", "language")).to(device, torch.bfloat16)
    expected = step(model, device=device)
    assert len(expected[1]) == len(list(model.parameters()))
    assert_same_bits(step(model, "recompute", device), expected)
    for kept in KEPT:
        assert_same_bits(step(model, "selective", device, kept=kept, vision_kept=Kept(kept.attention, kept.mlp, 0)), expected)
    engine = OffloadEngine(1 << 24, device=torch.device(device))
    assert_same_bits(step(model, "offload", device, engine=engine), expected)


def test_what_is_kept_takes_the_bytes_of_a_model_without_rounding():
    """The plan of memory counts inputs in their own precision."""
    found = []
    for recipe in (None, "rowwise"):
        model = make(recipe)
        for kept in (Kept(3), Kept(3, 3), Kept(3, 3, 3)):
            sizes: dict[int, int] = {}

            def note(tensor, sizes=sizes):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
                return tensor

            model.set_activation_checkpointing("selective", kept=kept)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                hidden = torch.randn(61, 64, requires_grad=True)
                model.language_model.model.layers[0].mlp(hidden)
            found.append(sum(sizes.values()))
    assert found[:3] == found[3:]


def test_query_key_and_value_share_one_rounded_input(monkeypatch):
    from eagle_kernels.ops.float8 import function

    rounded = []
    by_rows = function.by_rows
    monkeypatch.setattr(function, "by_rows", lambda x: rounded.append(tuple(x.shape)) or by_rows(x))
    model = make("rowwise", intermediate_size=96)
    with torch.no_grad():
        model(pack())
    assert rounded.count((61, 64)) == 3 * LAYERS  # q, k and v; gate and up; o


def test_a_hook_is_called():
    model, calls = make("rowwise"), []
    model.language_model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("q"))
    model.language_model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append("up"))
    expected = step(make("rowwise"))
    found = step(model)
    assert calls == ["q", "up"]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


def test_layers_of_several_kinds():
    first, second = nn.Linear(32, 16), Float8Linear(nn.Linear(32, 16), "rowwise")
    x = torch.randn(5, 32)
    outs = apply_together((first, second), x)
    assert torch.equal(outs[0], first(x))
    assert torch.equal(outs[1], second(x))


def test_adapters_are_not_rounded_and_can_be_merged():
    model = make()
    add_lora(model, "language", rank=2, alpha=4.0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad_(is_adapter(name))
    exact = step(model)
    use_float8(model, "language", "rowwise")
    assert {type(layer) for layer in linear_layers(model, "language").values()} == {Float8LoraLinear}
    expected = step(model)
    assert set(expected[1]) == set(exact[1])
    for kept in KEPT:
        assert_same_bits(step(model, "selective", kept=kept), expected)
    layer = model.language_model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    adapted = layer(x) - Float8Linear(layer, "rowwise")(x)
    assert torch.allclose(adapted, x @ layer.lora_A.t() @ layer.lora_B.t() * layer.scale, atol=1e-5)
    weight = layer.weight + layer.lora_B @ layer.lora_A * layer.scale
    merge_lora(model)
    assert torch.allclose(model.language_model.model.layers[0].mlp.up_proj.weight, weight)


@pytest.mark.parametrize("exact", [False, True])
def test_the_fused_mlp_is_used_where_kernels_run(monkeypatch, exact):
    """On a GPU one operator computes the MLP, told what backward finds."""
    from eagle_model.language import mlp

    calls = []
    monkeypatch.setattr(mlp, "float8_mlp", lambda x, *weights, **options: calls.append(options) or x)
    model = make("rowwise_with_gw_hp" if exact else "rowwise")
    layer = model.language_model.model.layers[0].mlp
    with use_implementation("triton"):
        layer(torch.randn(5, 64))
    assert calls == [{"recompute": False, "exact_weight_gradient": exact}]


def test_sizes_and_four_bits_are_refused_and_nothing_is_changed():
    model = make(intermediate_size=72)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj has 64 inputs and 72 outputs; .* multiples of 16"):
        use_float8(model, "language")
    assert {type(layer) for layer in linear_layers(model, "language").values()} == {nn.Linear}
    model = make()
    quantized = QuantizedLinear.__new__(QuantizedLinear)
    nn.Module.__init__(quantized)
    quantized.in_features = quantized.out_features = 64
    replace_layer(model, "language_model.model.layers.1.self_attn.q_proj", quantized)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj has weights in 4 bits"):
        use_float8(model, "language")
    assert not any(isinstance(module, Float8Linear) for module in model.modules())


@pytest.mark.parametrize(
    ("kept", "vision_kept", "measured"), [(None, None, 45.07), (Kept(28, 28, 27), Kept(27, 1, 0), 127.54)], ids=["recompute", "selective"]
)
def test_planned_memory_of_the_8b_is_what_was_measured(kept, vision_kept, measured):
    """GiB of one step over 32768 tokens on an H200, `step.py --only 32k --fp8` of 2026-11-28."""
    config = preset("8b", image_token_index=151665)
    shape, tower = decoder_shape(config, Training(float8=True)), vision_shape(config, 32768 - 2048)
    plan = plan_memory(shape, 32768, vision=tower, labelled=2048, kept=kept, vision_kept=vision_kept)
    assert plan.gpu / 2**30 == pytest.approx(measured, rel=0.005)
