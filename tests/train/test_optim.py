"""The learning rate at the corners of a schedule, and what gets weight decay."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from eagle_train.config import StageConfig
from eagle_train.training.optim import learning_rate, make_optimizer, set_learning_rates, set_trainable


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
    assert set_trainable(model, ["connector", "language"]) == (2 + 2 + 4 + 2) + 4
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
        set_trainable(model, ["connector"])


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
