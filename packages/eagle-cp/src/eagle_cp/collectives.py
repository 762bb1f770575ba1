"""The collectives of a process group. Every rank calls them in the same order, and each call is recorded.

The record has two uses: tests compare the records of the ranks, and the watchdog reports which rank waits for which collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor


class CollectiveCall(NamedTuple):
    """One collective: its number in the order of its group, the operation, the group (`ulysses`, `all_gather` or `context`), and elements
    per rank."""

    number: int
    operation: str
    group: str
    elements: int
    dtype: str


class Pending(NamedTuple):
    """A collective that may not have finished."""

    call: CollectiveCall
    since: float  # time.monotonic()
    work: dist.Work


class Group:
    """A process group with a name, the record of its collectives, and those that have not finished. None: a group of one rank."""

    def __init__(self, name: str, process_group: dist.ProcessGroup | None):
        self.name = name
        self.process_group = process_group
        self.size = dist.get_world_size(process_group) if process_group is not None else 1
        self.rank = dist.get_rank(process_group) if process_group is not None else 0
        self.ranks = dist.get_process_group_ranks(process_group) if process_group is not None else [0]
        self.calls = 0
        self.record: list[CollectiveCall] | None = None  # set to a list to keep every call
        self.pending: list[Pending] | None = None  # set to a list by the watchdog
        self.last: CollectiveCall | None = None

    def _issue(self, operation: str, elements: int, dtype: torch.dtype, start: Callable[[], dist.Work | None]) -> dist.Work:
        call = CollectiveCall(self.calls, operation, self.name, elements, str(dtype).removeprefix("torch."))
        self.calls += 1
        self.last = call
        if self.record is not None:
            self.record.append(call)
        work = cast(dist.Work, start())  # None only with async_op=False
        if self.pending is not None:
            self.pending[:] = [p for p in self.pending if not p.work.is_completed()]
            self.pending.append(Pending(call, time.monotonic(), work))
        return work

    def all_gather(self, out: Tensor, x: Tensor) -> dist.Work:
        """`out: [size, *x.shape]`, contiguous. Asynchronous: call `wait()` before `out` is used, and keep `x` until then."""
        return self._issue(
            "all_gather",
            x.numel(),
            x.dtype,
            lambda: dist.all_gather_into_tensor(out.flatten(0, 1) if x.ndim else out, x, group=self.process_group, async_op=True),
        )

    def reduce_scatter(self, out: Tensor, x: Tensor) -> dist.Work:
        """`x: [size, *out.shape]`, contiguous; `out` becomes the sum over ranks of `x[rank]`. Asynchronous."""
        return self._issue(
            "reduce_scatter",
            out.numel(),
            x.dtype,
            lambda: dist.reduce_scatter_tensor(out, x.flatten(0, 1), group=self.process_group, async_op=True),
        )

    def all_to_all(self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]) -> dist.Work:
        """`out` and `x` are flat; the splits count elements per rank. Asynchronous."""
        return self._issue(
            "all_to_all",
            x.numel(),
            x.dtype,
            lambda: dist.all_to_all_single(out, x, list(out_splits), list(in_splits), group=self.process_group, async_op=True),
        )

    def all_gather_rows(self, row: Tensor) -> Tensor:
        """Small metadata, `[n]` -> `[size, n]`. Waits. For checks, not for every layer."""
        out = row.new_empty((self.size, *row.shape))
        if self.size == 1:
            out[0] = row
            return out
        self.all_gather(out, row).wait()
        return out
