"""What `model.activations: selective` keeps of the layers' activations: as much as fits the GPU memory that a step may use.

Chosen for every stage, from the plan of its longest pack, before its first step; the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eagle_kernels import Kept, MemoryPlan, fill_memory
from eagle_kernels.offload import GIB
from eagle_model.memory import vision_shape
from eagle_train.config import Config, StageConfig
from eagle_train.distributed.world import World
from eagle_train.planning.gpus import largest_plan

from .activations import planned


@dataclass(frozen=True)
class Selection:
    """What decoder and vision tower keep, the plan with it, and the bytes that the plan had to fit (None: no limit is known)."""

    kept: Kept
    vision_kept: Kept
    plan: MemoryPlan
    room: float | None
    layers: int
    vision_layers: int

    @property
    def text(self) -> str:
        """One line for people."""
        tower = f"; vision tower: {self.vision_kept.text(self.vision_layers)}" if self.vision_layers else ""
        limit = f" of {self.room / GIB:.1f}" if self.room is not None else ""
        return f"kept for backward: decoder: {self.kept.text(self.layers)}{tower}; planned {self.plan.gpu / GIB:.1f}{limit} GiB"


def select(config: Config, described: Any, ranks: int, room: float | None) -> Selection:
    """The most that a step over the longest pack of `config` can keep with a plan of `room` bytes; None: everything."""
    frozen = all(stage.modes["vision"] == "frozen" for stage in config.stages)
    layers = described.text_config.num_hidden_layers
    vision_layers = 0 if frozen else vision_shape(described, 0).depth

    def plan(kept: Kept, vision_kept: Kept) -> MemoryPlan:
        return planned(config, described, ranks, kept=kept, vision_kept=vision_kept)

    if room is None:
        kept, vision_kept = Kept.all(layers), Kept.all(vision_layers)
        return Selection(kept, vision_kept, plan(kept, vision_kept), None, layers, vision_layers)
    return Selection(*fill_memory(plan, room, layers=layers, vision_layers=vision_layers), room, layers, vision_layers)


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
        return select(self.config.replaced(stages=[stage]), described, self.ranks, self.room)
