"""Documents shared by gather ranks: which of the gathered keys a rank picks, and the kernel calls it makes with them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from eagle_cp.segments import Segments, cumulative, ranges

# Queries from which a segment of a shared document gets a kernel call of its own: 28 heads of 4096 queries are 7 rounds of a Hopper's 132
# multiprocessors.
LONG_SEGMENT = 4096


class Step(NamedTuple):
    """One kernel call: the rank's rows `queries` with the picked keys `keys`. `unique`: no key is in two of its segments."""

    queries: slice
    keys: slice
    segments: Segments
    unique: bool


class SharedPlan:
    """Attention of one gather rank's pieces of shared documents over the gathered keys and values `[gather, 2, rows, heads, D]`.

    `rows`: rows that every rank sends (the longest rank's; a shorter rank sends some of its own rows too, which nobody reads). `index`
    picks `keys` keys, then their values, from the gathered rows. `steps`: those with most keys first. `segments`: all pieces as one
    packed problem."""

    def __init__(self, segments: Segments, steps: tuple[Step, ...], index: torch.Tensor, rows: int, ranks: int):
        self.segments, self.steps, self.rows, self.ranks = segments, steps, rows, ranks
        self.keys = len(index)
        self._index = {torch.device("cpu"): torch.cat((index, index + rows))}

    def index(self, device: torch.device) -> torch.Tensor:
        if device not in self._index:
            self._index[device] = self._index[torch.device("cpu")].to(device, non_blocking=True)
        return self._index[device]


def make_steps(lengths_q: list[int], lengths_k: list[int], keys: list[int], causal: bool) -> tuple[tuple[Step, ...], torch.Tensor]:
    """The kernel calls for segments of `lengths_q` queries in order and `lengths_k` keys from `keys` on; and which keys to pick for them.

    A long segment is a call of its own on a slice of its document's keys, which are picked once; one longer than half of the rank's rows
    becomes two, so that the kernel's fp32 accumulators of dQ are never for more than about half of the rows. Runs of short segments share
    a call, for which their keys are picked one segment after the other, some keys twice."""
    total, long = sum(lengths_q), {}
    for nq, nk, key in zip(lengths_q, lengths_k, keys):
        if nq >= LONG_SEGMENT:
            long[key] = max(nk, long.get(key, 0))
    place = dict(zip(long, cumulative(list(long.values()))))  # of a long document's first key among the picked ones
    picked = [ranges(list(long), list(long.values()))]
    keys_picked = sum(long.values())
    steps: list[Step] = []
    run: list[tuple[int, int]] = []  # short segments since the last long one
    row = 0

    def call(lengths: list[tuple[int, int]], stop: int, first_key: int, unique: bool) -> None:
        cu_q, cu_k = (cumulative(n) for n in zip(*lengths))
        steps.append(Step(slice(stop - cu_q[-1], stop), slice(first_key, first_key + cu_k[-1]), Segments(cu_q, cu_k), unique))

    def end_run() -> None:
        nonlocal keys_picked
        if run:
            call(run, row, keys_picked, False)
            keys_picked += sum(nk for _, nk in run)
            run.clear()

    for nq, nk, key in zip(lengths_q, lengths_k, keys):
        if nq < LONG_SEGMENT:
            run.append((nq, nk))
            picked.append(torch.arange(key, key + nk))
            row += nq
            continue
        end_run()
        cut = nq // 2 if nq >= 2 * LONG_SEGMENT and nq > 0.6 * total else 0
        if cut:
            call([(cut, nk - (nq - cut) if causal else nk)], row + cut, place[key], True)
        row += nq
        call([(nq - cut, nk)], row, place[key], True)
    end_run()
    return tuple(sorted(steps, key=lambda step: step.keys.start - step.keys.stop)), torch.cat(picked)
