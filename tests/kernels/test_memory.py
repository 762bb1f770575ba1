"""plan_memory: sums computed by hand, and the direction in which every option must change them."""

import dataclasses

import pytest

from eagle_kernels import DecoderShape, Training, VisionShape, plan_memory
from eagle_kernels.memory.shapes import nf4_bytes

QWEN = DecoderShape(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, head_dim=128, vocab=152064)
SIGLIP = VisionShape(width=1152, intermediate=4304, layers=27, patches=120 * 1024)
GIB = 1 << 30
FROZEN, LORA, QLORA = Training("frozen"), Training("lora", rank=16), Training("lora", rank=16, quantized=True)


def test_parameters_of_qwen_7b():
    assert QWEN.parameters == 7_615_616_512  # the published count


def test_stored_states_by_hand():
    plan = plan_memory(QWEN, 32768)
    state = 32768 * 3584 * 2
    assert plan.parts["weights"] == 2 * QWEN.parameters
    on_host = plan_memory(QWEN, 32768, offload=True)
    assert on_host.host == 27 * state
    assert plan_memory(QWEN, 32768, offload=True, gpu_states=28).host == 0
    assert plan_memory(QWEN, 32768, offload=True, keep_attention=True).host == 27 * (2 * state + 4 * 32768 * 28)


@pytest.mark.parametrize(
    "less",
    [
        {"offload": True, "tokens": 131072},
        {"mlp_rows": 4096, "tokens": 131072},
        {"shards": 8},
        {"gradients_kept": False},
        {"optimizer_bytes": 0},
        {"labelled": 100},
    ],
)
def test_options_that_save_memory_lower_the_peak(less):
    usual = {"tokens": 32768, "optimizer_bytes": 12, "gradients_kept": True}
    tokens = less.pop("tokens", usual.pop("tokens"))
    assert plan_memory(QWEN, tokens, **(usual | less)).gpu <= plan_memory(QWEN, tokens, **usual).gpu
    if "labelled" not in less:
        assert plan_memory(QWEN, tokens, **(usual | less)).gpu < plan_memory(QWEN, tokens, **usual).gpu


def test_vision_adds_memory_and_a_frozen_tower_less():
    tower = VisionShape(width=1152, intermediate=4304, layers=27, patches=120 * 1024)
    without = plan_memory(QWEN, 32768).gpu
    frozen = plan_memory(QWEN, 32768, vision=dataclasses.replace(tower, training=FROZEN)).gpu
    assert without < frozen < plan_memory(QWEN, 32768, vision=tower).gpu


def test_tied_head_has_one_matrix_less():
    tied = dataclasses.replace(QWEN, tied=True)
    assert QWEN.parameters - tied.parameters == 152064 * 3584


def test_str_names_the_parts():
    text = str(plan_memory(QWEN, 32768, offload=True))
    assert "peak in" in text
    assert "weights: 14.19 GiB" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"mlp_rows": 0}, "mlp_rows is 0"),
        ({"labelled": 9}, "labelled"),
        ({"gpu_states": -3}, "gpu_states is -3, expected 0 or more"),
        ({"weight_bytes": 0}, "weight_bytes is 0, expected 1 or more"),
        ({"compute_bytes": 0}, "compute_bytes is 0"),
        ({"optimizer_bytes": -8}, "optimizer_bytes is -8"),
        ({"decoder": dataclasses.replace(QWEN, vocab=0)}, "decoder.vocab is 0"),
        ({"decoder": dataclasses.replace(QWEN, kv_heads=5)}, "decoder.heads is 28, expected a multiple of decoder.kv_heads, which is 5"),
        ({"decoder": dataclasses.replace(QWEN, hidden=-64)}, "decoder.hidden is -64"),
        ({"decoder": dataclasses.replace(QWEN, training=Training("lora", rank=-1))}, "decoder.training.rank is -1, expected 0 or more"),
        ({"kept_bytes": -1}, "kept_bytes is -1"),
        ({"vision": dataclasses.replace(SIGLIP, merge=0)}, "vision.merge is 0"),
        ({"vision": dataclasses.replace(SIGLIP, patches=-1)}, "vision.patches is -1, expected 0 or more"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(**({"decoder": QWEN, "tokens": 8} | change))


def test_zero_patches():
    assert plan_memory(QWEN, 8, vision=dataclasses.replace(SIGLIP, patches=0)).gpu < plan_memory(QWEN, 8, vision=SIGLIP).gpu


TRAINER = {"weight_bytes": 4, "gradient_bytes": 4, "optimizer_bytes": 8, "compute_bytes": 2}


def test_parameters_of_the_8b_model():
    """Counted on the model, built on the meta device."""
    assert SIGLIP.parameters == 413_327_088
    assert SIGLIP.connector_parameters(3584) == 29_376_512


def test_stored_vision_activations_by_hand():
    patches, tokens = 120 * 1024, 120 * 256
    found = SIGLIP.kept(3584, 2)
    assert found["vision checkpoints"] == 27 * patches * 1152 * 2
    # Inputs of the post-layernorm, of the connector's LayerNorm and its first Linear; input and output of GELU; the connector's output.
    assert found["connector"] == tokens * (3 * 4608 + 3 * 3584) * 2
    assert found["pixels"] == patches * 588 * 3
    frozen = dataclasses.replace(SIGLIP, training=FROZEN).kept(3584, 2)
    assert frozen["vision checkpoints"] == 0
    assert frozen["connector"] == tokens * (2 * 4608 + 3 * 3584) * 2


@pytest.mark.parametrize("shards", [1, 2, 8, 64])
def test_shards_divide_stored_parameters_and_not_the_copies_for_computation(shards):
    plan = plan_memory(QWEN, 32768, vision=SIGLIP, shards=shards, **TRAINER)
    parameters = QWEN.parameters + SIGLIP.parameters + SIGLIP.connector_parameters(3584)
    root = parameters - 28 * QWEN.layer_parameters - 27 * SIGLIP.layer_parameters
    for parts in plan.moments.values():
        assert parts["weights"] == 4 * parameters // shards
        assert parts["optimizer"] == 8 * parameters // shards
    # Embedding, head, norms and connector are gathered, and two layers; with several ranks a third layer is being received.
    assert plan.moments["the loss"]["whole weights"] == 2 * (root + (2 if shards == 1 else 3) * QWEN.layer_parameters)
    first = plan.moments["backward of layer 0, MLP"]
    assert first["gradients"] == 4 * 27 * QWEN.layer_parameters // shards
    assert first["gradients of the rest"] == 2 * (QWEN.vocab * QWEN.hidden + QWEN.hidden)
    assert plan.moments["the last reduction"]["gradients in reduction"] == root * (4 + max(2, 4 // shards))
    if shards > 1:
        assert plan.gpu < plan_memory(QWEN, 32768, vision=SIGLIP, shards=shards // 2, **TRAINER).gpu


def test_a_reduction_can_be_the_peak():
    """With a large vocabulary and few tokens, the float32 input of the last reduction is the largest."""
    small = dataclasses.replace(QWEN, layers=2)
    plan = plan_memory(small, 256, **TRAINER)
    assert plan.moment == "the last reduction"
    assert plan.gpu == sum(plan.parts.values()) == max(sum(parts.values()) for parts in plan.moments.values())


def trained_as(language, vision=FROZEN, connector=FROZEN, **options):
    tower = dataclasses.replace(SIGLIP, training=vision, connector=connector)
    return plan_memory(dataclasses.replace(QWEN, training=language), 32768, vision=tower, **(TRAINER | options))


def test_adapters_by_hand():
    """Rank x (inputs + outputs) of every linear layer, which alone have gradients and optimizer states."""
    layer = 16 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    shape = dataclasses.replace(QWEN, training=LORA)
    assert shape.layer.trained == layer
    assert shape.total.plain == QWEN.parameters + 28 * layer
    assert shape.rest.trained == 0
    plan = trained_as(LORA)
    for parts in plan.moments.values():
        assert parts["optimizer"] == 8 * 28 * layer
    assert plan.moments["the optimizer's step"]["gradients"] == 4 * 28 * layer
    assert plan.moments["the loss"]["head gradient in float32"] == 0
    assert "the vision tower's backward" not in plan.moments
    some = dataclasses.replace(QWEN, training=Training("lora", rank=8, targets=("q_proj", "mlp.down_proj")))
    assert some.layer.trained == 8 * (3584 + 3584 + 18944 + 3584)


def test_weights_in_four_bits_by_hand():
    assert nf4_bytes(256 * 64) == 8192 + 256 + 4 + 4
    linears = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    shape = dataclasses.replace(QWEN, training=QLORA)
    assert shape.total.quantized_bytes * 8 / linears == pytest.approx(4.127, abs=1e-3)
    assert shape.total.plain == QWEN.parameters - linears + shape.total.trained
    one, eight = (trained_as(QLORA, shards=shards).moments["the loss"]["weights"] for shards in (1, 8))
    assert one - shape.total.quantized_bytes == pytest.approx(8 * (eight - shape.total.quantized_bytes), abs=64)


def test_what_is_not_trained_saves_memory():
    plans = [trained_as(training).gpu for training in (Training(), LORA, QLORA)]
    assert plans == sorted(plans, reverse=True)
    full, adapters = (sum(trained_as(training).moments["the optimizer's step"].values()) for training in (Training(), LORA))
    own = dataclasses.replace(QWEN, training=LORA).total.trained
    assert full - adapters == 12 * (QWEN.parameters - own) - 4 * own  # gradients of 4 bytes and states of 8; the adapters are weights too
    assert trained_as(FROZEN, connector=Training()).gpu < plans[0]
    assert trained_as(LORA, kept_bytes=GIB).gpu == plans[1] + GIB
    forward_only = dataclasses.replace(SIGLIP, training=FROZEN, connector=FROZEN).kept(3584, 2)
    assert forward_only == {"pixels": SIGLIP.patches * SIGLIP.patch_values}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens": 1.5}, r"tokens is 1\.5, expected a whole number"),
        ({"shards": 1.5}, r"shards is 1\.5, expected a whole number"),
        ({"labelled": 1.5}, r"labelled is 1\.5, expected a whole number from 0 to 100"),
        ({"weight_bytes": float("nan")}, "weight_bytes is nan, expected 1 or more"),
        ({"optimizer_bytes": float("inf")}, "optimizer_bytes is inf"),
        ({"vision_group": 0}, "vision_group is 0, expected 1 or more"),
    ],
)
def test_sizes_that_are_not_whole_numbers_are_refused(given, words):
    decoder = DecoderShape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=100)
    with pytest.raises(ValueError, match=words):
        plan_memory(decoder, **({"tokens": 100} | given))


def test_an_unknown_mode_of_training_is_refused():
    with pytest.raises(ValueError, match="mode is 'qlora', expected 'full', 'lora' or 'frozen'"):
        Training(mode="qlora")
