"""Segments: the description of packed attention that every kernel gets.

Segment `i` is the queries `[cu_q[i], cu_q[i+1])` with the keys `[cu_k[i], cu_k[i+1])`. Its queries are the *last* ones of its keys
(bottom-right causal alignment): a piece of a document together with everything before it. A whole document has as many queries as
keys. Without a causal mask only the lengths count, and a segment may have more queries than keys (`aligned=False`): all branches of a
tree over their prefix."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


class Segments:
    """Packed attention problem of one rank.

    cu_q, cu_k: cumulative lengths, `n + 1` numbers each, on the host; `on(device)` copies them once.
    aligned: the queries of a segment are the last of its keys; False: only for attention without a causal mask.

    Raises ValueError when a segment has no query or no key, or, if `aligned`, fewer keys than queries.
    """

    def __init__(self, cu_q: Sequence[int], cu_k: Sequence[int], *, aligned: bool = True):
        self.cu_q = tuple(int(x) for x in cu_q)
        self.cu_k = tuple(int(x) for x in cu_k)
        if len(self.cu_q) != len(self.cu_k):
            raise ValueError(
                f"segments: {len(self.cu_q) - 1} query lengths but {len(self.cu_k) - 1} key lengths; give one of each per segment"
            )
        self.lengths_q = tuple(b - a for a, b in zip(self.cu_q, self.cu_q[1:]))
        self.lengths_k = tuple(b - a for a, b in zip(self.cu_k, self.cu_k[1:]))
        for i, (nq, nk) in enumerate(zip(self.lengths_q, self.lengths_k)):
            if nq < 1 or nk < (nq if aligned else 1):
                needed = "1 <= queries <= keys" if aligned else "a query and a key"
                raise ValueError(f"segments: number {i} has {nq} queries and {nk} keys; every segment needs {needed}")
        self.max_q = max(self.lengths_q, default=0)
        self.max_k = max(self.lengths_k, default=0)
        self._device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.cache: dict[Any, Any] = {}  # what kernels derive from the lengths (index tensors, block lists), made on first use

    def __len__(self) -> int:
        return len(self.lengths_q)

    @property
    def total_q(self) -> int:
        return self.cu_q[-1]

    @property
    def total_k(self) -> int:
        return self.cu_k[-1]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`cu_q`, `cu_k` as int32 tensors on `device`; copied once, then kept."""
        if device not in self._device:
            cu_q = torch.tensor(self.cu_q, dtype=torch.int32).to(device, non_blocking=True)
            cu_k = cu_q if self.cu_q == self.cu_k else torch.tensor(self.cu_k, dtype=torch.int32).to(device, non_blocking=True)
            self._device[device] = (cu_q, cu_k)
        return self._device[device]

    def pairs(self, causal: bool) -> int:
        """Number of attended (query, key) pairs: the work of one query head."""
        if causal:
            return sum(nq * nk - nq * (nq - 1) // 2 for nq, nk in zip(self.lengths_q, self.lengths_k))
        return sum(nq * nk for nq, nk in zip(self.lengths_q, self.lengths_k))


def integers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """A list, array or tensor of integers as ints (a CUDA tensor is copied to the host once). Raises ValueError for anything else."""
    whole: list[int] = []
    for value in cast(Iterable[Any], getattr(values, "tolist", lambda: values)()):
        try:
            whole.append(operator.index(value))
        except TypeError:
            raise ValueError(f"{name}: expected integers, got {value!r}") from None
    return tuple(whole)


def score_factor(name: str, scale: float | None, head_dim: int) -> float:
    """The factor of scores: `scale`, or `head_dim ** -0.5`. Raises ValueError unless it is finite and above 0, as all kernels need it."""
    if head_dim < 1:
        raise ValueError(f"{name}: the head dimension is {head_dim}; expected at least 1")
    factor = head_dim**-0.5 if scale is None else float(scale)
    if not 0.0 < factor < float("inf"):
        raise ValueError(f"{name}: scale is {scale}; expected a finite number above 0, or None for {head_dim} ** -0.5")
    return factor


def int_list(x: Tensor) -> list[int]:
    """A 1-D tensor of integers as ints; waits for the device."""
    return cast(list[int], x.tolist())  # pyright: ignore[reportUnknownMemberType]


def cumulative(lengths: Iterable[int]) -> list[int]:
    """`[0, lengths[0], lengths[0] + lengths[1], ...]`."""
    result = [0]
    for n in lengths:
        result.append(result[-1] + n)
    return result


def ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """`[starts[0], starts[0] + 1, ..., starts[1], ...]`, `lengths[i]` numbers from each start."""
    n = torch.tensor(lengths, dtype=torch.int64)
    offset = torch.tensor(starts, dtype=torch.int64) - (n.cumsum(0) - n)
    return torch.arange(int(n.sum())) + offset.repeat_interleave(n)
