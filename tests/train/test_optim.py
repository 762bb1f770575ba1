"""The learning rate at the corners of a schedule, and what gets weight decay."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from eagle_train.config import ConfigError, StageConfig
from eagle_train.training.optim import OPTIMIZERS, check_optimizers, learning_rate, make_optimizer, set_learning_rates, set_trainable


def stage(**fields):
    return StageConfig(**({"name": "s", "max_tokens": 100, "lr": 1.0, "warmup_ratio": 0.1} | fields))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_peak_and_end(schedule):
    one = stage(schedule=schedule, final_lr_ratio=0.2)
    rates = [learning_rate(step, 100, one) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    end = {"cosine": 0.2, "linear": 0.2, "constant": 1.0}[schedule]
    assert learning_rate(100, 100, one) == pytest.approx(end)
    assert rates[-1] >= end


def test_without_warmup_the_first_step_has_the_peak():
    assert learning_rate(0, 5, stage(warmup_ratio=0.0)) == 1.0


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_model = nn.Linear(2, 2)
        self.mlp1 = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
        self.language_model = nn.Linear(2, 2, bias=False)

    def parts(self):
        return {"vision": self.vision_model, "connector": self.mlp1, "language": self.language_model}


def test_only_matrices_decay_and_frozen_parts_are_left_out():
    model = Parts()
    assert set_trainable(model, {"connector": "full", "language": "full"}) == (2 + 2 + 4 + 2) + 4
    optimizer = make_optimizer(model, stage(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("vision_model."):
            assert not parameter.requires_grad
            assert id(parameter) not in decay
        else:
            assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0)


def test_a_parameter_of_no_part_is_named():
    model = Parts()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight belongs to none of the model's parts, which are vision, connector, language"):
        set_trainable(model, {"connector": "full"})


def test_groups_keep_their_own_scale_of_the_rate():
    optimizer = make_optimizer(Parts(), stage(warmup_ratio=0.0))
    optimizer.param_groups[1]["lr_scale"] = 0.1
    assert set_learning_rates(optimizer, 0, 5, stage(warmup_ratio=0.0)) == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, pytest.approx(0.1)]


def test_step_moves_parameters_by_the_rate():
    model = Parts()
    optimizer = make_optimizer(model, stage(weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    before = model.language_model.weight.detach().clone()
    model.language_model.weight.grad = torch.ones_like(before)
    optimizer.step()
    # Adam's first step has the size of the learning rate.
    torch.testing.assert_close(model.language_model.weight.detach(), before - 0.01)


def eagle(stage_, **lora):
    from eagle_model.lora import add_lora
    from tests.support.models import tiny_model

    model = tiny_model()
    for part, rank in lora.items():
        add_lora(model, part, rank=rank, alpha=2.0)
    set_trainable(model, stage_.modes)
    return model


def rates(model, stage_):
    optimizer = make_optimizer(model, stage_)
    set_learning_rates(optimizer, 0, 5, stage_)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


def test_parts_learn_at_their_own_rates():
    parts = {"vision": {"lr": 0.1, "weight_decay": 0.2, "layer_decay": 0.5}, "language": {"train": "frozen"}}
    one = stage(warmup_ratio=0.0, weight_decay=0.4, parts=parts)
    found = rates(eagle(one), one)
    assert not any(name.startswith("language_model.") for name in found)
    assert found["mlp1.1.weight"] == (1.0, 0.4)
    assert found["mlp1.1.bias"] == (1.0, 0.0)
    tower = "vision_model.vision_model."
    for layer in range(3):
        assert found[f"{tower}encoder.layers.{layer}.mlp.fc1.weight"] == (pytest.approx(0.1 * 0.5 ** (3 - layer)), 0.2)
    assert found[f"{tower}embeddings.patch_embedding.weight"] == (pytest.approx(0.1 * 0.5**4), 0.2)
    assert found[f"{tower}post_layernorm.weight"] == (pytest.approx(0.1), 0.0)


def test_lora_trains_adapters_alone():
    one = stage(train=["connector"], parts={"language": {"train": "lora", "lr": 0.5}}, warmup_ratio=0.0)
    found = rates(eagle(one, language=2), one)
    assert {name for name in found if name.startswith("language_model.")} == {
        f"language_model.model.layers.{layer}.{module}.lora_{matrix}"
        for layer in range(2)
        for module in (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
        for matrix in "AB"
    }
    assert {rate for name, (rate, _) in found.items() if name.startswith("language_model.")} == {0.5}
    full = stage()
    assert not any("lora" in name for name in rates(eagle(full, language=2), full))


def test_without_settings_of_parts_there_are_two_groups():
    """Checkpoints of earlier releases hold these."""
    one = stage()
    groups = make_optimizer(eagle(one), one).param_groups
    assert [group["weight_decay"] for group in groups] == [one.weight_decay, 0.0]
    assert not any("lr_scale" in group or "matrix" in group for group in groups)


def test_muon_takes_the_matrices_of_linear_layers():
    one = stage(optimizer="muon")
    model = eagle(one)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(p)] for group in make_optimizer(model, one).param_groups if group["matrix"] for p in group["params"]}
    assert "language_model.model.layers.0.mlp.up_proj.weight" in matrices
    assert "mlp1.1.weight" in matrices
    others = set(names.values()) - matrices
    assert {"language_model.model.embed_tokens.weight", "vision_model.vision_model.embeddings.patch_embedding.weight"} <= others
    assert all(name.endswith(".bias") or "norm" in name or "embed" in name or name.startswith("mlp1.0") for name in others)


def test_the_table_is_the_schema():
    from typing import get_args

    assert get_args(StageConfig.model_fields["optimizer"].annotation) == tuple(OPTIMIZERS)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw8bit"])
def test_state_takes_the_bytes_of_the_table(name):
    one = stage(optimizer=name)
    model = eagle(one)
    optimizer = make_optimizer(model, one)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    layer = model.language_model.model.layers[0].mlp.up_proj.weight
    size = sum(value.numel() * value.element_size() for value in optimizer.state[layer].values() if value.ndim)
    assert size / layer.numel() == pytest.approx(OPTIMIZERS[name].state_bytes + OPTIMIZERS[name].host_bytes, abs=0.5)


@pytest.mark.integration
def test_adamw8bit():
    pytest.importorskip("torchao")
    one = stage(optimizer="adamw8bit", lr=1e-2, warmup_ratio=0.5)
    model = eagle(one)
    optimizer = make_optimizer(model, one)
    assert set_learning_rates(optimizer, 0, 4, one) == pytest.approx(5e-3)
    before = model.mlp1[1].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = (before - model.mlp1[1].weight.detach() - before * 5e-3 * one.weight_decay).mean()
    assert moved == pytest.approx(5e-3, rel=0.05)


def test_what_a_later_stage_needs_is_looked_for_before_the_first(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    check_optimizers([stage(optimizer="muon"), stage()])
    with pytest.raises(ConfigError, match=r"stages.s.optimizer: adamw8bit needs torchao"):
        check_optimizers([stage(), stage(optimizer="adamw8bit")])


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    one = stage(optimizer="adamw8bit")
    with pytest.raises(ConfigError, match=r"stages.s.optimizer: adamw8bit needs torchao .*pip install 'eagle-train\[gpu\]'"):
        make_optimizer(eagle(one), one)
