"""Selective activation checkpointing: what the layers of a stack keep for backward, and the most that fits (`fill_memory`).

A layer keeps its input and, by its level, more:

| level | kept too | not computed again |
|---|---|---|
| `NOTHING` | | the last projection of the MLP, which backward never needs |
| `ATTENTION` | attention output and log-sum-exps | attention |
| `PROJECTIONS` | queries, keys, values; output of the attention block | the attention block's matrix products |
| `MLP` | gate and up (vision tower: input of the GELU) | all matrix products |

Norms, rotary positions and activation functions are always computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from eagle_kernels.memory.plan import MemoryPlan

NOTHING, ATTENTION, PROJECTIONS, MLP = range(4)
NAMES = ("attention", "projections", "mlp")


@dataclass(frozen=True)
class Kept:
    """In how many layers of a stack each level is reached: the last layers, whose activations backward releases first.

    Raises ValueError for negative numbers, and where a level is reached in more layers than the one below it.
    """

    attention: int = 0
    projections: int = 0
    mlp: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.mlp <= self.projections <= self.attention:
            raise ValueError(
                f"Kept: attention {self.attention}, projections {self.projections}, mlp {self.mlp}; each must be at least 0 and at most "
                "the one before it"
            )

    @classmethod
    def all(cls, layers: int) -> Kept:
        """Everything in every layer."""
        return cls(layers, layers, layers)

    def level(self, index: int, layers: int) -> int:
        """The level of layer `index` of `layers`."""
        return sum(index >= layers - count for count in (self.attention, self.projections, self.mlp))

    def borders(self, layers: int) -> set[int]:
        """Layers next to a change of the level, and the first and the last one."""
        starts = {layers - count for count in (self.attention, self.projections, self.mlp)}
        return {index for index in (0, layers - 1, *starts, *(start - 1 for start in starts)) if 0 <= index < layers}

    def text(self, layers: int) -> str:
        """For messages."""
        parts = [f"{name} {getattr(self, name)}" for name in NAMES if getattr(self, name)]
        return f"{', '.join(parts) or 'nothing'} of {layers} layers"


class Filled(NamedTuple):
    """What decoder and vision tower keep, and the plan with it."""

    kept: Kept
    vision_kept: Kept
    plan: MemoryPlan


#: Stack (0: decoder, 1: vision tower) and level, in the order in which they are kept: by FLOPs that a byte saves. At 32K tokens of the 8B
#: a byte of attention output saves 33000 FLOPs, of a projection 3600; in the tower 2000 (at a lower rate) and 1150.
ORDER = ((0, "attention"), (1, "attention"), (0, "projections"), (0, "mlp"), (1, "projections"), (1, "mlp"))


def fill_memory(plan: Callable[[Kept, Kept], MemoryPlan], room: float, *, layers: int, vision_layers: int = 0) -> Filled:
    """The most that decoder and vision tower can keep with a plan of at most `room` bytes of GPU memory, and that plan.

    plan: of what both keep (`plan_memory`). layers, vision_layers: of the stacks; 0 where nothing is stored (a frozen tower). What saves
    more computation per byte goes first. When nothing fits, nothing is kept.
    """
    kept, counts = [Kept(), Kept()], (layers, vision_layers)
    for stack, name in ORDER:
        below = NAMES[NAMES.index(name) - 1] if name != NAMES[0] else None
        low, high = 0, counts[stack] if below is None else getattr(kept[stack], below)
        while low < high:
            middle = (low + high + 1) // 2
            tried = list(kept)
            tried[stack] = replace(kept[stack], **{name: middle})
            low, high = (middle, high) if plan(tried[0], tried[1]).gpu <= room else (low, middle - 1)
        kept[stack] = replace(kept[stack], **{name: low})
    return Filled(kept[0], kept[1], plan(kept[0], kept[1]))
