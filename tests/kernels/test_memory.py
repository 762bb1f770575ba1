"""plan_memory: sums that can be done by hand, and the directions in which every choice must move them."""

import dataclasses

import pytest

from eagle_kernels import DecoderShape, VisionShape, plan_memory

QWEN = DecoderShape(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, head_dim=128, vocab=152064)
GIB = 1 << 30


def test_parameters_of_qwen_7b():
    assert QWEN.parameters == 7_615_616_512  # the published count


def test_checkpoints_by_hand():
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
def test_what_saves_memory_saves_it(less):
    usual = {"tokens": 32768, "optimizer_bytes": 12, "gradients_kept": True}
    tokens = less.pop("tokens", usual.pop("tokens"))
    assert plan_memory(QWEN, tokens, **(usual | less)).gpu <= plan_memory(QWEN, tokens, **usual).gpu
    if "labelled" not in less:
        assert plan_memory(QWEN, tokens, **(usual | less)).gpu < plan_memory(QWEN, tokens, **usual).gpu


def test_vision_costs_and_a_frozen_tower_costs_less():
    tower = VisionShape(width=1152, intermediate=4304, layers=27, patches=120 * 1024)
    without = plan_memory(QWEN, 32768).gpu
    frozen = plan_memory(QWEN, 32768, vision=dataclasses.replace(tower, frozen=True)).gpu
    assert without < frozen < plan_memory(QWEN, 32768, vision=tower).gpu


def test_tied_head_has_one_matrix_less():
    tied = dataclasses.replace(QWEN, tied=True)
    assert QWEN.parameters - tied.parameters == 152064 * 3584


def test_text_names_the_parts():
    text = str(plan_memory(QWEN, 32768, offload=True))
    assert "peak in" in text
    assert "weights: 14.19 GiB" in text


@pytest.mark.parametrize(
    ("change", "says"), [({"tokens": 0}, "tokens is 0"), ({"mlp_rows": 0}, "mlp_rows is 0"), ({"labelled": 9}, "labelled")]
)
def test_bad_input(change, says):
    with pytest.raises(ValueError, match=says):
        plan_memory(QWEN, **({"tokens": 8} | change))
