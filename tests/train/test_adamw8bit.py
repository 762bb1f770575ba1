"""8-bit AdamW: next to torch's AdamW, in float32 and bfloat16, sharded, and where a mean square is rounded to zero."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

pytest.importorskip("torchao")


from eagle_train.training.adamw8bit import make_adamw8bit
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def eager(request, monkeypatch):
    """Compiling takes 10 seconds and more on a CPU: in one test alone."""
    if "compiled" not in request.node.name:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)


SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def steps(parameters, gradients, make):
    optimizer = make(parameters)
    for gradient in gradients:
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = value.to(parameter.dtype)
        optimizer.step()
    return optimizer


def ours(parameters):
    return make_adamw8bit([{"params": parameters, "weight_decay": 0.1}], {p: str(i) for i, p in enumerate(parameters)}, **SETTINGS)


def adamw(parameters):
    return torch.optim.AdamW([{"params": parameters, "weight_decay": 0.1}], **SETTINGS)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-3), (torch.bfloat16, 6e-3), pytest.param(torch.float32, 1e-3, id="compiled")],
)
def test_weights_are_those_of_adamw(dtype, bound):
    """Shapes of 8-bit states (a matrix, a kernel), and of states that stay in float32 (too small, not a multiple of the block)."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, dtype=dtype) for shape in ((512, 96), (32, 3, 8, 8), (100,), (5, 1000))]
    gradients = [[torch.randn(weight.shape) for weight in weights] for _ in range(4)]
    found = [nn.Parameter(weight.clone()) for weight in weights]
    expected = [nn.Parameter(weight.float()) for weight in weights]
    optimizer = steps(found, gradients, ours)
    steps(expected, gradients, adamw)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < bound * other.norm()
    kinds = [type(optimizer.state[p]["exp_avg_sq"]).__name__ for p in found]
    assert kinds == ["OptimState8bit", "OptimState8bit", "Tensor", "Tensor"]
    assert all(optimizer.state[p]["exp_avg_sq"].dtype == torch.float32 for p in found)


def test_a_lost_mean_square_does_not_move_its_weight():
    """A small gradient next to large ones, then none: its mean square is zero in 8 bits, its mean is not."""
    weight = nn.Parameter(torch.zeros(4096))
    gradient = torch.ones(4096)
    gradient[7] = 1e-5
    later = torch.ones(4096)
    later[7] = 0.0
    optimizer = steps([weight], [[gradient]], ours)
    state = optimizer.state[weight]
    assert state["exp_avg_sq"].dequantize()[7] == 0
    assert state["exp_avg"].dequantize()[7] != 0
    before = weight[7].item()
    weight.grad = later
    optimizer.step()
    assert abs(weight[7].item() - before) < SETTINGS["lr"]


def test_states_are_kept_as_they_are_loaded():
    torch.manual_seed(0)
    gradients = [[torch.randn(8192), torch.randn(10)] for _ in range(4)]
    whole, halves = ([nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in (8192, 10)] for _ in range(2))
    steps(whole, gradients, ours)
    first = steps(halves, gradients[:2], ours)

    def resumed(parameters):
        optimizer = ours(parameters)
        optimizer.load_state_dict(first.state_dict())
        return optimizer

    steps(halves, gradients[2:], resumed)
    for one, other in zip(whole, halves, strict=True):
        assert torch.equal(one, other)


def _sharded():
    torch.manual_seed(0)
    model = nn.Linear(96, 512, bias=True, dtype=torch.bfloat16)
    alone = nn.Linear(96, 512, bias=True, dtype=torch.bfloat16)
    alone.load_state_dict(model.state_dict())
    inputs = torch.randn(8, 96, dtype=torch.bfloat16)
    fully_shard(model)
    for module in (model, alone):
        parameters = list(module.parameters())
        optimizer = ours(parameters)
        for _ in range(3):
            module(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        # Blocks of a shard begin elsewhere: quantisation differs.
        assert (one.full_tensor().float() - other.float()).norm() < 2e-2 * other.float().norm()


def test_sharded_weights_in_bfloat16():
    run_on_ranks(2, _sharded)
