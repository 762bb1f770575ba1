"""Layout: which token of a pack lives on which rank, and all metadata that attention needs, computed once per batch on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eagle_cp.segments import Segments


def check_cu_seqlens(cu_seqlens: torch.Tensor | Sequence[int]) -> tuple[int, ...]:
    """Cumulative lengths as ints: starts at 0, strictly rising. A CUDA tensor is copied to the host once, here."""
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
    values = [int(x) for x in values]
    if len(values) < 2 or values[0] != 0:
        raise ValueError(f"cu_seqlens: expected [0, end of document 0, ..., total], got {values[:6]}{'...' if len(values) > 6 else ''}")
    for i, (a, b) in enumerate(zip(values, values[1:])):
        if b <= a:
            raise ValueError(f"cu_seqlens: document {i} has length {b - a} ([{a}, {b})); leave empty documents out")
    return tuple(values)


class Layout:
    """`cu_seqlens`: host ints; `total`: tokens of the pack; `local`: tokens on this rank."""

    def __init__(self, cu_seqlens: tuple[int, ...]):
        self.cu_seqlens = cu_seqlens
        self.total = cu_seqlens[-1]
        self.local = self.total
        self.segments = Segments(cu_seqlens, cu_seqlens)

    @classmethod
    def single(cls, cu_seqlens: torch.Tensor | Sequence[int]) -> Layout:
        """The layout of one rank that holds the whole pack: no mesh, no communication, `shard` and `unshard` are the identity."""
        return cls(check_cu_seqlens(cu_seqlens))

    def shard(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return x

    def unshard(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return x
