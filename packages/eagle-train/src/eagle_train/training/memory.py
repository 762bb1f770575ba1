"""GPU memory of a run: refused before anything is loaded when it cannot fit, and explained when it ran out after all.

Both name the smallest change of the configuration that helps, as `plan_memory` sees it: activation checkpointing first, then the
optimizer, packs shared by more ranks and more GPUs, two of these together, then adapters instead of the language model's weights, and at
last shorter packs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from eagle_kernels import MemoryPlan
from eagle_kernels.offload import GIB, available_host_bytes
from eagle_train.config import Config, ConfigError, PartConfig, StageConfig
from eagle_train.distributed.world import World
from eagle_train.errors import TrainError
from eagle_train.loading.pack import LoadedPack

from .activations import resolved
from .optim import OPTIMIZERS
from .selection import Selection, fitting_plans
from .step_memory import planned

SMALLEST = 1024
"""Tokens below which no shorter pack is proposed."""
MOST_RANKS = 64
"""Ranks up to which more GPUs are proposed."""


class OutOfMemory(TrainError, RuntimeError):
    """The GPU's memory ran out in a step."""


@dataclass(frozen=True)
class Usage:
    """Bytes of a GPU: `total` of the card, `free` for this process to take, `peak` that torch has held at once."""

    total: int
    free: int
    peak: int


def usage(device: torch.device) -> Usage | None:
    """What the driver reports (`torch.cuda.mem_get_info`) and what torch has reserved; None for a device that reports nothing."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return Usage(total, free + torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device))


@dataclass(frozen=True)
class Change:
    """A change of the configuration, in words, and what a step then needs."""

    text: str
    plan: MemoryPlan


def changes(config: Config, described: Any, ranks: int) -> Iterator[Change]:
    """Changes that need less memory, from the least to the most intrusive: single ones, two together, adapters, and at last shorter packs.

    config: with `model.activations` resolved.
    """
    kinds = (_activations, _optimizers, _sharing, _more_gpus)
    for kind in kinds:
        for text, changed, number in kind(config, ranks):
            yield Change(text, planned(changed, described, number))
    for first, second in itertools.combinations(kinds, 2):
        for text, changed, number in first(config, ranks):
            for then, both, together in second(changed, number):
                yield Change(f"{text} and {then}", planned(both, described, together))
    for text, changed in _adapters(config):
        yield Change(text, planned(changed, described, ranks))
    limit = config.max_tokens // 2
    while limit >= SMALLEST:
        shorter = [stage.replaced(max_tokens=min(stage.max_tokens, limit)) for stage in config.stages]
        yield Change(f"stages.*.max_tokens: at most {limit}", planned(config.replaced(stages=shorter), described, ranks))
        limit //= 2


_Changed = Iterator[tuple[str, Config, int]]


def _activations(config: Config, ranks: int) -> _Changed:
    modes = {"keep": ("recompute", "offload"), "recompute": ("offload",), "selective": ("offload",)}
    for mode in modes.get(config.model.activations, ()):
        yield f"model.activations: {mode}", _with(config, activations=mode), ranks


def _optimizers(config: Config, ranks: int) -> _Changed:
    if any(stage.optimizer == "adamw" for stage in config.stages):
        yield "stages.*.optimizer: adamw_host (its states in host memory)", _with(config, optimizer="adamw_host"), ranks
        yield f"stages.*.optimizer: {_EIGHT_BIT}", _with(config, optimizer="adamw8bit"), ranks
        if config.model.weights == "float32":
            least = _with(config, optimizer="adamw8bit", weights="bfloat16")
            yield f"stages.*.optimizer: {_EIGHT_BIT}, model.weights: bfloat16", least, ranks


def _sharing(config: Config, ranks: int) -> _Changed:
    """More ranks for each pack, while there are ranks."""
    parallel = config.parallel
    for gather in range(parallel.all_gather + 1, ranks // parallel.ulysses + 1):
        if ranks % (gather * parallel.ulysses) == 0:
            split = parallel.replaced(all_gather=gather, data=None)
            yield f"parallel.all_gather: {gather} (packs shared by {split.group_size} GPUs)", config.replaced(parallel=split), ranks


def _more_gpus(config: Config, ranks: int) -> _Changed:
    number = ranks * 2
    while config.parallel.fsdp and number <= MOST_RANKS:
        yield f"{number} GPUs instead of {ranks}", config, number
        number *= 2


def _adapters(config: Config) -> Iterator[tuple[str, Config]]:
    """Adapters where stages train the language model in full, and its weights in 4 bits."""
    full = [stage for stage in config.stages if stage.modes["language"] == "full"]
    if not full:
        return
    text = "stages.*.parts.language.train: lora"
    stages = [_with_adapters(stage) if stage in full else stage for stage in config.stages]
    yield text, config.replaced(stages=stages)
    model = config.model.replaced(quantize={**config.model.quantize, "language": "nf4"})
    yield f"{text}, model.quantize: {{language: nf4}} (needs bitsandbytes)", config.replaced(stages=stages, model=model)


def _with_adapters(stage: StageConfig) -> StageConfig:
    settings = stage.parts.get("language", PartConfig()).replaced(train="lora")
    return stage.replaced(parts={**stage.parts, "language": settings})


_EIGHT_BIT = "adamw8bit (needs torchao)"


def _with(config: Config, *, optimizer: str | None = None, **model: Any) -> Config:
    """A configuration with other fields of `model`, and another optimizer where it is adamw."""
    stages = [stage.replaced(optimizer=optimizer) if optimizer and stage.optimizer == "adamw" else stage for stage in config.stages]
    return config.replaced(stages=stages, model=config.model.replaced(**model))


def smallest_change(config: Config, described: Any, ranks: int, room: float) -> str:
    """The first of `changes` with which a step needs at most `room` bytes of each GPU, as a sentence."""
    for change in changes(config, described, ranks):
        if change.plan.gpu <= room:
            return f"The smallest change that helps: {change.text} (planned: {change.plan.gpu / GIB:.1f} GiB)"
    tried = "activations, optimizer, context split, adapters, pack length or number of GPUs (up to 64)"
    return f"No change of {tried} makes it fit: choose a smaller model"


def parts_of(plan: MemoryPlan) -> str:
    """The largest parts of a plan's peak, for messages."""
    largest = sorted(plan.parts.items(), key=lambda part: -part[1])[:4]
    return f"{plan.gpu / GIB:.1f} GiB, the peak in {plan.moment}: " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)


def check_limit(config: Config, described: Any, ranks: int, device: torch.device) -> None:
    """Raises ConfigError when the least plan of a stage exceeds `model.gpu_memory`."""
    limit = config.model.gpu_memory
    if limit is None:
        return
    plans = fitting_plans(config, described, ranks, limit * GIB, device)
    name, plan = max(plans.items(), key=lambda one: one[1].gpu)
    if plan.gpu <= limit * GIB:
        return
    advice = smallest_change(resolved(config, device), described, ranks, limit * GIB)
    raise ConfigError(
        f"model.gpu_memory: {limit:g} GiB are too few for stages.{name}: a step is planned to need at least {parts_of(plan)}. Raise it, or "
        f"{advice[0].lower()}{advice[1:]}"
    )


def check_memory(
    config: Config, described: Any, world: World, *, look: Callable[[torch.device], Usage | None] = usage
) -> MemoryPlan | None:
    """Raises ConfigError, on every rank, when the longest pack of the run cannot fit on the fullest of its GPUs; a collective.

    Returns the plan; None without a GPU. A plan is a lower bound with `model.activations: keep`, is that of the least with `selective`, and
    is always without the CUDA context and libraries' workspaces: what it refuses cannot work.
    """
    seen = world.gather(look(world.device))
    found = [(one.free, rank, one.total) for rank, one in enumerate(seen) if one is not None]
    if not found:
        return None
    check_limit(config, described, world.size, world.device)
    free, rank, total = min(found)
    plans = fitting_plans(config, described, world.size, free, world.device)
    config = resolved(config, world.device)
    stage = max(config.stages, key=lambda stage: plans[stage.name].gpu)
    plan = plans[stage.name]
    if plan.gpu <= free:
        return plan
    taken = f", {(total - free) / GIB:.1f} GiB of which are taken by other processes" if total - free > GIB else ""
    raise ConfigError(
        f"stages.{stage.name}: a pack of {stage.max_tokens} tokens cannot fit: a step is planned to need {parts_of(plan)}; the GPU of rank "
        f"{rank} has {total / GIB:.1f} GiB{taken}. {smallest_change(config, described, world.size, free)}"
    )


def check_host_memory(config: Config, trained: int, total: int, world: World, *, available: int | None = None) -> None:
    """Raises ConfigError, on every rank, when a host cannot hold what its ranks keep there: states of `adamw_host`, and the copy that a
    checkpoint in the background is written from; a collective.

    trained, total: elements of the whole model that are trained, and all. available: bytes that this host can spare; None asks the system.
    """
    shards = max(1, world.size // config.parallel.replicate) if config.parallel.fsdp else 1
    choices = [OPTIMIZERS[stage.optimizer] for stage in config.stages]
    states = max(choice.host_bytes for choice in choices) * trained // shards
    kept = max(choice.most_bytes + choice.host_bytes for choice in choices) * trained
    copy = (kept + (2 if config.model.weights == "bfloat16" else 4) * total) // shards if config.checkpoint.background else 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    available = available_host_bytes() if available is None else available
    for rank, (ranks, spare) in enumerate(world.gather((local, available))):
        if spare is None or ranks * (states + copy) <= spare:
            continue
        helps = "checkpoint.background: false" if ranks * states <= spare else "stages.*.optimizer: adamw8bit (needs torchao)"
        raise ConfigError(
            f"the host of rank {rank} can spare {spare / GIB:.1f} GiB and its {ranks} ranks need {ranks * (states + copy) / GIB:.1f}: "
            f"{ranks * states / GIB:.1f} for the optimizer's states and {ranks * copy / GIB:.1f} for the copy that checkpoints are written "
            f"from in the background. The smallest change that helps: {helps}"
        )


@contextmanager
def explained(
    config: Config,
    described: Any,
    world: World,
    *,
    stage: StageConfig,
    step: int,
    doing: str,
    pack: LoadedPack | None = None,
    selection: Selection | None = None,
) -> Iterator[None]:
    """Turns an out-of-memory error inside into OutOfMemory: which stage, step and pack, the plan, and the smallest change that helps.

    doing: what the step does, for the message. selection: what `selective` keeps. The plan was too low if it comes to this: changes are
    judged by the plan times the factor by which it was.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        config = resolved(config, world.device)
        least, now = planned(config, described, world.size), usage(world.device)
        plan = selection.plan if selection is not None else least
        text = f"stage {stage.name} step {step}: out of GPU memory on rank {world.rank} in {doing}"
        if pack is not None:
            ids = ", ".join(f"{source}:{line}" for source, line in pack.sample_ids[:5])
            more = f" and {len(pack.sample_ids) - 5} more" if len(pack.sample_ids) > 5 else ""
            text += f" ({pack.tokens} tokens, {pack.tile_count} tiles; samples {ids}{more})"
        factor = 1.0
        if now is not None:
            text += f". The card has {now.total / GIB:.1f} GiB, torch held {now.peak / GIB:.1f}"
            factor = max(1.0, now.peak / plan.gpu)
        text += f". The plan of its longest pack: {parts_of(plan)}"
        room = now.free / factor if now is not None else plan.gpu * 0.9
        helps = smallest_change(config, described, world.size, room)
        if config.model.activations == "keep":  # what is kept is not in the plan
            helps = "The smallest change that helps: model.activations: selective"
        elif least.gpu < plan.gpu and least.gpu <= (lower := min(room, plan.gpu / factor, plan.gpu * 0.95)):
            helps = f"The smallest change that helps: model.gpu_memory: {lower / GIB:.1f} (activations: selective then keeps less)"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemory(
            f"{text}. {helps}. The same command continues from the newest checkpoint "
            f"(model.activations, parallel and checkpoint may change). torch: {first}"
        ) from error
