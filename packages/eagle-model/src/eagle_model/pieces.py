"""The pieces of a transformer layer that backward computes again, by what the layer keeps (`eagle_kernels.Kept`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from eagle_kernels import Recompute
from eagle_kernels.memory import ATTENTION, MLP, PROJECTIONS
from eagle_kernels.recompute import call

T = TypeVar("T")


class Run(Protocol):
    """Runs a function on arguments, as a piece (`Recompute`) or as it is (`call`)."""

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T: ...


class Pieces:
    """How to run each piece of a layer.

    cheap: norms, residuals, activation functions, which are memory-bound. queries: projections to queries, keys and values. rotate: rotary
    positions. attention; output: its output projection. mlp: the first projections of the MLP.
    """

    def __init__(self, again: Recompute | None, level: int, *, exchanged: bool = False) -> None:
        """again: None runs every piece as it is. exchanged: attention keeps what Ulysses exchanged, so local queries need not be kept."""

        def unless(kept: bool) -> Run:
            return call if kept or again is None else again

        own = exchanged and level >= ATTENTION
        self.keeps_gate = again is None or level >= MLP
        self.cheap = unless(False)
        self.rotate = unless(own)
        self.attention = unless(level >= ATTENTION)
        self.queries = unless(own or level >= PROJECTIONS)
        self.output = unless(level >= PROJECTIONS)
        self.mlp = unless(level >= MLP)


WHOLE = Pieces(None, MLP)
"""Autograd keeps everything that it wants."""
