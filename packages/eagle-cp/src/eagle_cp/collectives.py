"""The collectives of a context group, each called by every rank in the same order, each recorded.

What is recorded serves two things: a test compares the ranks' records, and the watchdog says which rank waits for which collective.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist


class Call(NamedTuple):
    """One collective: its number in this group's order, what it is, which group (`ulysses`, `gather`, `context`), and its size per rank."""

    number: int
    operation: str
    group: str
    elements: int
    dtype: str


class Pending(NamedTuple):
    call: Call
    since: float  # time.monotonic()
    work: dist.Work


class Group:
    """A process group with a name, the order of its collectives, and those not yet finished. `size` 1 needs no process group."""

    def __init__(self, name: str, process_group: dist.ProcessGroup | None):
        self.name = name
        self.process_group = process_group
        self.size = dist.get_world_size(process_group) if process_group is not None else 1
        self.rank = dist.get_rank(process_group) if process_group is not None else 0
        self.ranks = dist.get_process_group_ranks(process_group) if process_group is not None else [0]
        self.calls = 0
        self.record: list[Call] | None = None  # set to a list to keep every call
        self.pending: list[Pending] | None = None  # set to a list by the watchdog
        self.last: Call | None = None

    def _issue(self, operation: str, elements: int, dtype: torch.dtype, start) -> dist.Work:
        call = Call(self.calls, operation, self.name, elements, str(dtype).removeprefix("torch."))
        self.calls += 1
        self.last = call
        if self.record is not None:
            self.record.append(call)
        work = start()
        if self.pending is not None:
            self.pending[:] = [p for p in self.pending if not p.work.is_completed()]
            self.pending.append(Pending(call, time.monotonic(), work))
        return work

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> dist.Work:
        """`out: [size, *x.shape]`, contiguous. Returns at once; `wait()` before use, and keep `x` until then."""
        return self._issue(
            "all_gather",
            x.numel(),
            x.dtype,
            lambda: dist.all_gather_into_tensor(out.flatten(0, 1) if x.ndim else out, x, group=self.process_group, async_op=True),
        )

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> dist.Work:
        """`x: [size, *out.shape]`, contiguous; `out` is the sum over ranks of `x[rank]`."""
        return self._issue(
            "reduce_scatter",
            out.numel(),
            x.dtype,
            lambda: dist.reduce_scatter_tensor(out, x.flatten(0, 1), group=self.process_group, async_op=True),
        )

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor, out_splits: Sequence[int], in_splits: Sequence[int]) -> dist.Work:
        """Flat buffers; element counts per rank."""
        return self._issue(
            "all_to_all",
            x.numel(),
            x.dtype,
            lambda: dist.all_to_all_single(out, x, list(out_splits), list(in_splits), group=self.process_group, async_op=True),
        )

    def gather_rows(self, row: torch.Tensor) -> torch.Tensor:
        """Small metadata, `[n]` -> `[size, n]`, waited for. Used for checks and plans, never per layer."""
        out = row.new_empty((self.size, *row.shape))
        if self.size == 1:
            out[0] = row
            return out
        self.all_gather(out, row).wait()
        return out
