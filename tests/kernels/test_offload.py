"""Activation offload: gradients equal those without it, properties of the arena, available host memory, errors with their numbers."""

import functools
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eagle_kernels import OffloadEngine, offload_checkpoint
from eagle_kernels.offload import ALIGNMENT, Arena, available_host_bytes

ROWS, WIDTH = 2048, 256  # a hidden state of 2 MiB in float32
STATE = ROWS * WIDTH * 4


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        heads = self.first(x).view(1, -1, 4, x.shape[-1] // 4).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads[:, :, :64], heads[:, :, :64], heads[:, :, :64], is_causal=True)
        return x + torch.tanh(self.second(x)) + F.pad(mixed.mean(dim=2).flatten(), (0, 0)).sum() * 1e-3


def layers(device: str, count: int = 5) -> nn.ModuleList:
    torch.manual_seed(3)
    return nn.ModuleList(Layer(WIDTH) for _ in range(count)).to(device)


def step(model: nn.ModuleList, x: torch.Tensor, run) -> list[torch.Tensor]:
    hidden = x
    for layer in model:
        hidden = run(layer, hidden)
    hidden.square().mean().backward()
    return [parameter.grad for parameter in model.parameters()] + [x.grad]


def where() -> list:
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def direct(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return layer(hidden)


@pytest.mark.parametrize("device", where())
@pytest.mark.parametrize("gpu_states", [0, 2, 9])
@pytest.mark.parametrize("keep", [False, True])
def test_gradients_are_those_of_a_plain_run(device, gpu_states, keep):
    x = torch.randn(ROWS, WIDTH, device=device)
    expected = step(layers(device), x.clone().requires_grad_(), direct)
    operators = ["aten::tanh"] if keep else []
    engine = OffloadEngine(10 * STATE, gpu_bytes=gpu_states * STATE, device=device, keep_operators=operators)
    for _ in range(3):  # memory of the arena is reused
        found = step(layers(device), x.clone().requires_grad_(), engine.checkpoint)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert engine.arena.free == engine.arena.capacity
        assert engine.gpu_used == 0


@pytest.mark.parametrize("device", where())
def test_kept_operators_do_not_run_again(device, monkeypatch):
    runs = []

    @torch.library.custom_op(f"eagle_kernels_test_{device}::slow", mutates_args=())
    def slow(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x * 2

    slow.register_fake(torch.empty_like)
    slow.register_autograd(lambda ctx, grad: grad * 2)

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return slow(hidden).sin()

    engine = OffloadEngine(20 * STATE, device=device, keep_operators=[f"eagle_kernels_test_{device}::slow"])
    x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
    hidden = x
    for _ in range(4):
        hidden = engine.checkpoint(layer, hidden)
    hidden.sum().backward()
    assert len(runs) == 4
    found, x.grad = x.grad, None
    hidden = x
    for _ in range(4):
        hidden = layer(hidden)
    hidden.sum().backward()
    assert torch.equal(found, x.grad)


def test_the_last_layer_stays_and_the_others_are_offloaded():
    engine = OffloadEngine(10 * STATE, device="cpu")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    hidden = x
    for layer in layers("cpu", 4):
        hidden = engine.checkpoint(layer, hidden)
    assert engine.arena.capacity - engine.arena.free == 3 * STATE
    del hidden
    gc.collect()
    assert engine.arena.free == engine.arena.capacity


def test_second_backward_through_one_graph():
    engine = OffloadEngine(10 * STATE, device="cpu")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    hidden = x
    for layer in layers("cpu", 3):
        hidden = engine.checkpoint(layer, hidden)
    first = torch.autograd.grad(hidden.sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(hidden.sum(), x)[0]
    assert torch.equal(first, second)


def test_without_an_engine_it_is_a_checkpoint():
    (layer,) = layers("cpu", 1)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    offload_checkpoint(layer, x).sum().backward()
    assert layer.calls == 2
    with torch.no_grad():
        OffloadEngine(STATE, device="cpu").checkpoint(layer, x)
    assert layer.calls == 3


@pytest.mark.parametrize("rows", [ROWS, 70], ids=["2 MiB", "70 KiB"])
@pytest.mark.parametrize("leaf", [False, True])
def test_an_argument_modified_in_place_is_an_error(rows, leaf):
    engine = OffloadEngine(10 * STATE, device="cpu")
    (layer,) = layers("cpu", 1)
    x = nn.Parameter(torch.randn(rows, WIDTH))
    hidden = x if leaf else x * 1
    out = offload_checkpoint(layer, hidden, engine=engine)
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        out.sum().backward()


@pytest.mark.parametrize("rows", [ROWS, 70], ids=["2 MiB", "70 KiB"])
def test_a_kept_output_modified_in_place_is_an_error(rows):
    """Recomputation would use the modified tensor as the operator's output."""
    engine = OffloadEngine(10 * STATE, device="cpu", keep_operators=["aten::tanh"])
    x = torch.randn(rows, WIDTH, requires_grad=True)
    out = engine.checkpoint(lambda x: x.tanh().mul_(2).sin(), x)
    with pytest.raises(RuntimeError, match="modified in place"):
        out.sum().backward()


def test_too_little_host_memory_is_an_error_with_both_sizes():
    with pytest.raises(MemoryError, match=r"3\.00 GiB of host memory are requested and 2\.00 GiB are available"):
        OffloadEngine(3 << 30, device="cpu", host_available=2 << 30)
    engine = OffloadEngine(2 * STATE, device="cpu")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with pytest.raises(MemoryError, match=r"0\.002 GiB do not fit"):
        functools.reduce(lambda hidden, layer: engine.checkpoint(layer, hidden), layers("cpu", 5), x)
    with pytest.raises(ValueError, match="capacity is 0"):
        OffloadEngine(0, device="cpu")
    with pytest.raises(ValueError, match="gpu_bytes is -1"):
        OffloadEngine(1, gpu_bytes=-1, device="cpu")


def test_the_arena_has_the_requested_size():
    arena = Arena(1_100_000, pin=False)
    assert arena.capacity == -(-1_100_000 // ALIGNMENT) * ALIGNMENT
    available = available_host_bytes()
    assert available is None or available > 0


def system(root: Path, group: str, files: dict[str, str], free: int = 900) -> Path:
    """A file system with `free` KiB of available memory and the control groups' files."""
    files = {"proc/meminfo": f"MemTotal: 1000 kB\nMemAvailable: {free} kB\n", "proc/self/cgroup": group} | {
        f"sys/fs/cgroup/{name}": text for name, text in files.items()
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


STAT = "anon 100000\nfile 400000\nshmem 50000\ninactive_file 300000\nactive_file 40000\nslab_reclaimable 10000\n"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max\n", "memory.current": "500000\n"}, 900 * 1024),
        ("0::/\n", {"memory.max": "600000\n", "memory.current": "500000\n"}, 100_000),
        # The kernel reclaims file pages, but not shared memory.
        ("0::/\n", {"memory.max": "600000\n", "memory.current": "500000\n", "memory.stat": STAT}, 450_000),
        # The process's group and its parents.
        ("1:name=systemd:/x\n0::/a/b\n", {"a/b/memory.max": "600000\n", "a/b/memory.current": "500000\n"}, 100_000),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "600000\n", "a/memory.current": "500000\n"}, 100_000),
        # A path outside of the container: only the container's group is visible, as the root.
        ("0::/../../kubepods/pod\n", {"memory.max": "600000\n", "memory.current": "500000\n"}, 100_000),
        ("0::/kubepods/pod\n", {"memory.max": "600000\n", "memory.current": "500000\n"}, 100_000),
        ("4:memory:/x\n", {}, 900 * 1024),
        ("0::/\n", {"memory.max": "600000\n", "memory.current": "700000\n"}, 0),
    ],
)  # fmt: skip
def test_available_memory_is_the_smallest_limit(tmp_path, group, files, expected):
    assert available_host_bytes(system(tmp_path, group, files)) == expected


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 5 * ALIGNMENT), st.integers(0, 3)), max_size=30))
def test_allocations_never_overlap_and_are_all_freed(requests):
    arena = Arena(64 * ALIGNMENT, pin=False)
    held: list[tuple[int, int]] = []
    for nbytes, give in requests:
        try:
            offset = arena.take(nbytes)
        except MemoryError:
            assert arena.free < 64 * ALIGNMENT
        else:
            assert offset >= 0
            assert offset + nbytes <= arena.capacity
            assert all(offset + nbytes <= start or start + size <= offset for start, size in held)
            held.append((offset, nbytes))
        for _ in range(min(give, len(held))):
            arena.give(*held.pop(len(held) // 2))
    for allocation in held:
        arena.give(*allocation)
    assert arena._free == [(0, arena.capacity)]


@pytest.mark.gpu
def test_gpu_memory_holds_three_states_at_most():
    """The growth of GPU memory in forward and backward does not depend on the number of layers."""
    peaks = []
    for count in (6, 18):
        model = layers("cuda", count)
        engine = OffloadEngine(20 * STATE, device="cuda")
        x = torch.randn(ROWS, WIDTH, device="cuda", requires_grad=True)
        with torch.no_grad():
            model[0](x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step_gradients = step(model, x, engine.checkpoint)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in step_gradients))
    assert peaks[1] <= peaks[0] + STATE // 4
