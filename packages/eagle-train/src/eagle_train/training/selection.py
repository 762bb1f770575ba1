"""What `model.activations: selective` keeps of the layers' activations: as much as fits the GPU memory that a step may use.

Chosen for every stage, from the plan of its longest pack, before its first step; the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eagle_kernels import Kept, MemoryPlan, fill_memory
from eagle_kernels.offload import GIB
from eagle_train.config import Config, StageConfig
from eagle_train.distributed.world import World
from eagle_train.planning.gpus import largest_plan

from .step_memory import rank_tokens, shapes, stage_plan

GROUP = 8
"""Tiles of a group where the tower keeps pixels alone: 8192 patches of 14 x 14 pixels, enough rows for matrix products at full rate."""


@dataclass(frozen=True)
class Selection:
    """What decoder and vision tower keep, and the plan with it.

    vision_group: tiles for which backward runs the tower at a time, from their pixels; None: the tower keeps what `vision_kept` says.
    room: bytes that the plan had to fit (None: no limit is known). layers, vision_layers: of both stacks; 0 for a frozen tower.
    """

    kept: Kept
    vision_kept: Kept
    plan: MemoryPlan
    room: float | None
    layers: int
    vision_layers: int
    vision_group: int | None = None

    @property
    def text(self) -> str:
        """One line for people."""
        tower = "" if not self.vision_layers else f"; vision tower: {self.vision_kept.text(self.vision_layers)}"
        if self.vision_group is not None:
            tower = f"; vision tower: pixels, run again for {self.vision_group} tiles at a time"
        limit = f" of {self.room / GIB:.1f}" if self.room is not None else ""
        return f"kept for backward: decoder: {self.kept.text(self.layers)}{tower}; planned {self.plan.gpu / GIB:.1f}{limit} GiB"


def select(config: Config, stage: StageConfig, described: Any, ranks: int, room: float | None) -> Selection:
    """The most that a step over the longest pack of a stage can keep with a plan of `room` bytes; None: everything.

    The tower may keep pixels alone, which leaves the decoder more, where less is computed again that way (`_may_group`).
    """
    decoder, tower = shapes(config, stage, described)
    layers, depth, tokens = decoder.layers, tower.depth if tower.learns else 0, rank_tokens(config, stage)

    def chosen(group: int | None) -> Selection:
        def plan(kept: Kept, vision_kept: Kept) -> MemoryPlan:
            vision_kept = vision_kept if group is None else Kept.all(depth)
            return stage_plan(config, stage, described, ranks, kept=kept, vision_kept=vision_kept, vision_group=group)

        if room is None:
            kept, vision_kept = Kept.all(layers), Kept.all(depth)
            most = plan(kept, vision_kept)
        else:
            kept, vision_kept, most = fill_memory(plan, room, layers=layers, vision_layers=0 if group else depth)
        return Selection(kept, Kept.all(depth) if group else vision_kept, most, room, layers, depth, group)

    def repeated(found: Selection) -> tuple[bool, int]:
        """What decides: the FLOPs that are computed again, or, where it does not fit, the memory."""
        if room is not None and found.plan.gpu > room:
            return True, found.plan.gpu
        levels = [found.kept.level(index, layers) for index in range(layers)]
        again = sum(decoder.repeated(level, tokens) for level in levels)
        return False, again + tower.repeated(found.vision_kept, grouped=found.vision_group is not None)

    by_layers = chosen(None)
    return min(by_layers, chosen(GROUP), key=repeated) if depth and room is not None and _may_group(config, ranks) else by_layers


def _may_group(config: Config, ranks: int) -> bool:
    """Whether the tower may run in groups of tiles.

    Not on several ranks, which would gather sharded parameters for every group and have different numbers of groups. Not with
    `run.deterministic`, because weight gradients are then sums over groups, in another order; and not with bfloat16 weights, whose
    gradients would add up in bfloat16.
    """
    return ranks == 1 and not config.run.deterministic and config.model.weights == "float32"


class Selector:
    """Chooses for every stage. Make it on all ranks together and before the model: it looks at what is free then."""

    def __init__(self, config: Config, world: World, look: Callable[[Any], Any]) -> None:
        """look: gives the memory of a device (`training.memory.usage`), or None."""
        self.config, self.ranks = config, world.size
        limit = config.model.gpu_memory
        found = [largest_plan(one.free / GIB) * GIB for one in world.gather(look(world.device)) if one is not None]
        if limit is not None:
            found.append(limit * GIB)
        #: Bytes that a plan may have, on the fullest GPU; None where nothing is known (a CPU, without model.gpu_memory).
        self.room = min(found, default=None)

    def select(self, stage: StageConfig, described: Any) -> Selection:
        return select(self.config, stage, described, self.ranks, self.room)
