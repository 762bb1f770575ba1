"""Finding and reading flash-attn-4's accumulators, with a stand-in for the package whose order is that of Hopper's matrix unit."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from eagle_cp.kernels import flash_attn_4
from eagle_cp.segments import Segments

TILE, DIM = 128, 128


def hopper_table():
    """Number of each row and column in a tile: 2 warp groups of 64 rows, whose threads hold 4 numbers of every 8 columns."""
    group, block, warp, high, low, half, pair = 2, 16, 4, 8, 4, 2, 2
    number = torch.arange(TILE * DIM).view(group, block, warp, high, low, half, pair)
    return number.permute(0, 2, 5, 3, 1, 4, 6).reshape(TILE, DIM)


class StandIn:
    """Its backward sets dK to `scale` times K, and dV to V."""

    def __init__(self, table=None, names=("zeros", "zeros")):
        self.table, self.names = hopper_table() if table is None else table, names

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, scale, causal, dq, dk, dv, cu_seqlens_k=None, **lengths):
        dq.zero_()
        if cu_seqlens_k is None:
            (k,), (v,), (dk,), (dv,) = k, v, dk, dv
            rows, shape = torch.arange(len(k)), (1, k.shape[1], -(-len(k) // TILE) * TILE * DIM)
        else:
            cu = cu_seqlens_k.tolist()
            rows = torch.cat([torch.arange(b - a) + (a + i * TILE) // TILE * TILE for i, (a, b) in enumerate(itertools.pairwise(cu))])
            shape = k.shape[1], (len(k) + len(cu) * TILE) // TILE * TILE * DIM
        place = (rows // TILE)[:, None] * TILE * DIM + self.table[rows % TILE]
        for name, x, grad, factor in zip(self.names, (k, v), (dk, dv), (scale, 1.0)):
            sums = getattr(torch, name)(shape, dtype=torch.float32)
            for h, head in enumerate(sums.view(k.shape[1], -1)):
                head[place] += x[:, h].float()
                grad[:, h] = (head[place] * factor).to(grad.dtype)


@pytest.fixture
def stand_in(monkeypatch):
    def use(*args):
        flash_attn_4.accumulator_order.cache_clear()
        module = StandIn(*args)
        monkeypatch.setattr(flash_attn_4, "interface", lambda: module)

    yield use
    flash_attn_4.accumulator_order.cache_clear()


@pytest.mark.parametrize("dense", [True, False])
def test_the_order_is_measured(stand_in, dense):
    stand_in()
    order = flash_attn_4.accumulator_order(torch.device("cpu"), torch.bfloat16, DIM, 7, True, dense)
    assert order is not None
    if not dense:  # with one segment, a tile and its halves are the same
        assert (order.tile, order.stride) == (TILE, TILE * DIM)
        assert torch.equal(order.table.long(), hopper_table())


@pytest.mark.parametrize(
    "arguments",
    [(torch.zeros(TILE, DIM, dtype=torch.int64),), (None, ("zeros", "ones")), (None, ("ones", "ones"))],
    ids=["numbers collide", "one accumulator", "no accumulator"],
)
def test_unknown_accumulators_are_not_read(stand_in, caplog, arguments):
    stand_in(*arguments)
    assert flash_attn_4.accumulator_order(torch.device("cpu"), torch.bfloat16, DIM, 7, True, False) is None
    assert "partial gradients" in caplog.text
    segments = Segments([0, 3], [0, 3])
    q, k, v = (torch.randn(3, h, DIM).bfloat16() for h in (4, 2, 2))
    dk, dv = torch.zeros(5, 2, DIM), torch.zeros(5, 2, DIM)
    flash_attn_4.backward_wide(q, q, k, v, q, torch.zeros(4, 3), segments, True, 0.5, torch.empty_like(q))(dk, dv, torch.tensor([4, 0, 2]))
    assert dv[1].count_nonzero() == 0
    assert dv[[4, 0, 2]].count_nonzero() > 0


READ = """
import torch
from eagle_cp.kernels import flash_attn_4
from eagle_cp.segments import Segments
from test_flash_attn_4 import DIM, StandIn

module = StandIn()
flash_attn_4.interface = lambda: module
for lengths, heads in (([20], 2), ([130, 5], 1)):
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    n, segments = cu[-1], Segments(cu, cu)
    q, k, v = (torch.randn(n, h, DIM).bfloat16() for h in (3 * heads, heads, heads))
    add_to = flash_attn_4.backward_wide(q, q, k, v, q, torch.zeros(3 * heads, n), segments, True, 0.5, torch.empty_like(q))
    rows = torch.randperm(n + 50)[:n]
    for rows, unique in ((rows, True), (rows // 2, False), (None, True)):
        both = torch.ones(n + 50, 2 * heads, DIM)  # dK and dV side by side: strided rows
        add_to(both[:, :heads], both[:, heads:], rows, unique)
        wanted = torch.ones_like(both)
        part = torch.cat((k.float() / 2, v.float()), 1)
        wanted.index_add_(0, torch.arange(n) if rows is None else rows, part)
        torch.testing.assert_close(both, wanted)
"""


def test_reading_them():
    """In a process of its own, where Triton interprets."""
    pytest.importorskip("triton")
    path = [os.path.dirname(__file__), *filter(None, sys.path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
