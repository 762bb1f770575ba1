"""8-bit AdamW: next to torch's AdamW, in float32 and bfloat16, sharded, and where a mean square is rounded to zero."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

pytest.importorskip("torchao")


from eagle_train.config import ParallelConfig
from eagle_train.distributed.world import start_world
from eagle_train.training import checkpoint, codes
from eagle_train.training.adamw8bit import make_adamw8bit
from eagle_train.training.rounding import key_of
from tests.support.interpreter import interpret
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


def check_kernel(device):
    """The kernel next to the step in torch on a CPU, from the same states: 8-bit and float32 ones, a lost mean square among them."""
    from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

    from eagle_train.training.adamw_kernel import launch

    torch.compile = lambda function, **_: function
    smallest = sorted(get_qmap_unsigned())[1]
    tables = [torch.tensor(table()) for table in (get_qmap_signed, get_qmap_unsigned)]
    borders = tuple(codes.thresholds(table).to(device) for table in tables)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for count in (256 * 21, 1000):
            weight = nn.Parameter(torch.randn(count, dtype=dtype))
            other = weight.detach().clone().to(device)
            optimizer = ours([weight])
            for number in range(1, 4):
                gradient = torch.randn(count) * torch.logspace(-6, 1, count)
                gradient[5] = 1e-7 if number == 1 else 0.0
                gradient = gradient.to(dtype)
                before = optimizer._state_of(weight)
                states = [before["exp_avg"], before["exp_avg_sq"]]
                copies = [
                    OptimState8bit(*(x.clone().to(device) for x in (one.codes, one.scale, one.qmap)), one.signed)
                    if isinstance(one, OptimState8bit)
                    else one.clone().to(device)
                    for one in states
                ]
                other.copy_(weight.detach())
                block = 256 if isinstance(states[0], OptimState8bit) else 0
                launch(
                    other, gradient.to(device), *copies, block, borders if block else None, step=number, lr=SETTINGS["lr"],
                    betas=SETTINGS["betas"], decay=0.1, eps=SETTINGS["eps"], smallest=smallest, key=key_of("0", number), first=0,
                )  # fmt: skip
                weight.grad = gradient
                optimizer.step()
                wrong = (other.cpu().float() - weight.detach().float()).abs()
                step = 2**-7 * weight.detach().abs().float() if dtype == torch.bfloat16 else 1e-6
                assert (wrong <= step).all()
                assert (wrong > 1e-6).float().mean() < 0.001  # bfloat16: the same random bits
                for power, one, copy in zip((1, 2), states, copies, strict=True):
                    if block:
                        assert (one.codes != copy.codes.cpu()).float().mean() < 0.001
                        assert (one.codes.int() - copy.codes.cpu().int()).abs().max() <= 1
                        torch.testing.assert_close(one.scale, copy.scale.cpu(), rtol=1e-6, atol=0)
                    else:
                        assert ((one - copy.cpu()).abs() <= 1e-5 * torch.logspace(-6, 1, count) ** power).all()


def test_the_kernel_is_the_same_step():
    interpret("from tests.train.test_adamw8bit import check_kernel; check_kernel('cpu')")


@pytest.mark.gpu
def test_the_kernel_is_the_same_step_on_a_gpu():
    check_kernel("cuda")


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


class Layers(nn.Module):
    """Shapes whose shards are in 8 bits or not, and at edges of blocks or not, by the number of ranks."""

    def __init__(self):
        super().__init__()
        self.mlp1 = nn.ModuleList(
            [nn.Conv2d(12, 64, 4), nn.Linear(96, 512), nn.Linear(64, 130, bias=False), nn.Linear(256, 2, bias=False), nn.Linear(9000, 1)]
        )


def whole(state):
    """A state of all ranks in float32. state: None on a rank that has no row of the parameter."""
    local = state.to_local() if hasattr(state, "to_local") else state
    local = local.dequantize() if hasattr(local, "dequantize") else local
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, None if local is None else local.numpy())
    return np.concatenate([part for part in parts if part is not None])


def on_ranks(folder, size, write):
    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.compile = lambda function, **_: function
    world = start_world(ParallelConfig(dtype="float32"), "cpu")
    torch.manual_seed(0)
    model = Layers()
    if size > 1:
        fully_shard(model)
    optimizer = make_adamw8bit([{"params": list(model.parameters())}], {}, **SETTINGS)
    progress = checkpoint.Progress(0, "s", size, size, False, {})
    if write:
        torch.manual_seed(1)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape) * torch.logspace(-3, 0, parameter.numel()).view(parameter.shape)
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements) if size > 1 else gradient
        optimizer.step()
        optimizer.zero_grad()
        checkpoint.write(folder, progress, model, optimizer, world)
    else:
        checkpoint.read(checkpoint.latest(folder), model, optimizer, world)
    result = {}
    for name, parameter in model.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            result[f"{name}.{kind}"] = whole(optimizer.state[parameter].get(kind))
    return result


@pytest.mark.parametrize(("wrote", "reads"), [(1, 3), (3, 1), (3, 2), (2, 3), (1, 4), (4, 1), (3, 3), (1, 1)])
def test_states_of_any_number_of_ranks_are_read_by_any_other(tmp_path, wrote, reads):
    [before, *_] = run_on_ranks(wrote, on_ranks, tmp_path, wrote, True)
    for after in run_on_ranks(reads, on_ranks, tmp_path, reads, False):
        assert after.keys() == before.keys()
        for name, values in before.items():
            if wrote == reads:
                assert (after[name] == values).all(), name
                continue
            # Blocks begin elsewhere: a value is rounded again, by at most 2 % of the largest one of its block.
            error = np.abs(after[name] - values)
            assert error.max() <= 0.02 * np.abs(values).max(), name
            assert np.linalg.norm(error) <= 0.02 * np.linalg.norm(values), name
