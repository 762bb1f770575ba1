"""What `model.activations: selective` keeps of the layers' activations: as much as fits the GPU memory that a step may use; and how
`offload`, which keeps the inputs of decoder layers in host memory, computes the rest again.

Chosen for every stage, from the plan of its longest pack, before its first step; the same on every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from eagle_kernels import DecoderShape, Kept, MemoryPlan, VisionShape, fill_memory
from eagle_kernels.offload import GIB
from eagle_train.config import Config, StageConfig
from eagle_train.distributed.world import World
from eagle_train.planning.gpus import largest_plan

from .activations import Mode, resolved, with_activations
from .step_memory import GROUPS, MLP_ROWS, other_sums, rank_tokens, shapes, stage_plan, stage_plans

TOWER_COST = 2
"""Time of the tower's FLOPs by that of the decoder's, whose matrices are larger. With 1, groups of tiles were chosen for the 8B at 64K on
an H200, and the step took 2 % longer than without them (2026-11-28, two machines, by the time of `recompute` on each)."""


@dataclass(frozen=True)
class Selection:
    """What decoder and vision tower keep, and the plan with it.

    vision_group: tiles for which backward runs the tower at a time, from their pixels; None: the tower keeps what `vision_kept` says.
    mlp_rows: tokens that MLPs of decoder layers work on at a time where gate and up are not kept; None: all.
    room: bytes that the plan had to fit (None: no limit is known). layers, vision_layers: of both stacks; 0 for a frozen tower.
    offload: inputs of decoder layers are in host memory, and nothing else of them is kept.
    """

    kept: Kept
    vision_kept: Kept
    plan: MemoryPlan
    room: float | None
    layers: int
    vision_layers: int
    vision_group: int | None = None
    mlp_rows: int | None = None
    offload: bool = False

    @property
    def mode(self) -> Mode:
        """Of activation checkpointing."""
        return "offload" if self.offload else "selective"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `set_activation_checkpointing` except mode and engine."""
        return {name: getattr(self, name) for name in ("kept", "vision_kept", "vision_group", "mlp_rows")}

    @property
    def text(self) -> str:
        """One line for people."""
        blocks = f", MLPs on {self.mlp_rows} tokens at a time" if self.mlp_rows is not None else ""
        tower = "" if not self.vision_layers else f"; vision tower: {self.vision_kept.text(self.vision_layers)}"
        if self.vision_group is not None:
            tower = f"; vision tower: pixels, run again for {self.vision_group} tiles at a time"
        limit = f" of {self.room / GIB:.1f}" if self.room is not None else ""
        decoder = f"inputs in host memory ({self.plan.host / GIB:.1f} GiB)" if self.offload else self.kept.text(self.layers)
        return f"kept for backward: decoder: {decoder}{blocks}{tower}; planned {self.plan.gpu / GIB:.1f}{limit} GiB"


class Planner(Protocol):
    """The plan of a step with what decoder and tower keep (`stage_plan`, or `plan_memory` with its sizes)."""

    def __call__(
        self, *, kept: Kept | None = None, vision_kept: Kept | None = None, vision_group: int | None = None, mlp_rows: int | None = None
    ) -> MemoryPlan: ...


def select(config: Config, stage: StageConfig, described: Any, ranks: int, room: float | None) -> Selection:
    """The most that a step over the longest pack of a stage can keep with a plan of `room` bytes; None: everything."""
    decoder, tower = shapes(config, stage, described)
    groups, rows = other_sums(config, ranks)
    plan, offload = partial(stage_plan, config, stage, described, ranks), config.model.activations == "offload"
    return fill(plan, room, decoder, tower, rank_tokens(config, stage), groups=groups, mlp_rows=rows, offload=offload)


def fill(
    plan: Planner,
    room: float | None,
    decoder: DecoderShape,
    tower: VisionShape,
    tokens: int,
    *,
    groups: Sequence[int] = GROUPS,
    mlp_rows: int | None = MLP_ROWS,
    offload: bool = False,
) -> Selection:
    """The most that a step over `tokens` tokens can keep with a plan of `room` bytes; None: everything. With offload: nothing of the
    decoder, and of the tower a group of tiles.

    The tower may keep pixels alone and run in one of `groups`, and MLPs may work on `mlp_rows` tokens at a time, which leave the decoder
    more, where less is computed again that way.
    """
    layers, depth = decoder.layers, tower.depth if tower.learns else 0

    def chosen(group: int | None, rows: int | None) -> Selection:
        def planned(kept: Kept, vision_kept: Kept) -> MemoryPlan:
            vision_kept = vision_kept if group is None else Kept.all(depth)
            return plan(kept=kept, vision_kept=vision_kept, vision_group=group, mlp_rows=rows)

        if offload:
            kept, vision_kept = Kept(), Kept.all(depth) if group else Kept()
            most = plan(vision_kept=vision_kept, vision_group=group, mlp_rows=rows)
        elif room is None:
            kept, vision_kept = Kept.all(layers), Kept.all(depth)
            most = planned(kept, vision_kept)
        else:
            kept, vision_kept, most = fill_memory(planned, room, layers=layers, vision_layers=0 if group else depth)
        return Selection(kept, Kept.all(depth) if group else vision_kept, most, room, layers, depth, group, rows, offload)

    def repeated(found: Selection) -> tuple[bool, int]:
        """What decides: the FLOPs that are computed again, by the decoder's rate, or, where it does not fit, the memory."""
        if room is not None and found.plan.gpu > room:
            return True, found.plan.gpu
        levels = [found.kept.level(index, layers) for index in range(layers)]
        again = sum(decoder.repeated(level, tokens) for level in levels)
        return False, again + TOWER_COST * tower.repeated(found.vision_kept, grouped=found.vision_group is not None)

    if room is None:
        return chosen(None, None)
    ways = itertools.product((None, *(groups if depth else ())), (None, *((mlp_rows,) if _in_blocks(decoder, tokens, mlp_rows) else ())))
    return min((chosen(group, rows) for group, rows in ways), key=repeated)


def _in_blocks(decoder: DecoderShape, tokens: int, rows: int | None) -> bool:
    return rows is not None and rows < tokens and decoder.mlp_in_blocks


def choose(config: Config, stage: StageConfig, described: Any, ranks: int, room: float | None, device: torch.device) -> Selection:
    """`select` with what `model.activations: auto` is on a device: `offload` where not even the least of `selective` fits and it helps."""
    found = select(resolved(config, device), stage, described, ranks, room)
    if config.model.activations != "auto" or room is None or found.plan.gpu <= room:
        return found
    other = select(with_activations(config, "offload"), stage, described, ranks, room)
    return min(found, other, key=lambda one: one.plan.gpu)


def fitting_plans(config: Config, described: Any, ranks: int, room: float, device: torch.device) -> dict[str, MemoryPlan]:
    """The least plan of every stage, by name; with `model.activations: auto` that of `offload` where that of `selective` exceeds `room`."""
    plans = stage_plans(resolved(config, device), described, ranks)
    if config.model.activations == "auto":
        others = stage_plans(with_activations(config, "offload"), described, ranks)
        plans = {name: min(plan, others[name], key=lambda one: one.gpu) if plan.gpu > room else plan for name, plan in plans.items()}
    return plans


class Selector:
    """Chooses for every stage. Make it on all ranks together and before the model: it looks at what is free then."""

    def __init__(self, config: Config, world: World, look: Callable[[Any], Any]) -> None:
        """look: gives the memory of a device (`training.memory.usage`), or None."""
        self.config, self.ranks, self.device = config, world.size, world.device
        limit = config.model.gpu_memory
        found = [largest_plan(one.free / GIB) * GIB for one in world.gather(look(world.device)) if one is not None]
        if limit is not None:
            found.append(limit * GIB)
        #: Bytes that a plan may have, on the fullest GPU; None where nothing is known (a CPU, without model.gpu_memory).
        self.room = min(found, default=None)

    def select(self, stage: StageConfig, described: Any) -> Selection:
        return choose(self.config, stage, described, self.ranks, self.room, self.device)
