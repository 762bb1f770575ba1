"""Memory of a step of every stage, from sizes alone: what its parts train, which weights are in 4 bits, and the stage's optimizer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from eagle_cp.planner import WHOLE_ROWS
from eagle_kernels import DecoderShape, Kept, MemoryPlan, Training, VisionShape, plan_memory
from eagle_model.memory import decoder_shape, vision_shape
from eagle_train.config import Config, StageConfig
from eagle_train.config.model import Part
from eagle_train.distributed.sharding import replicas_of

from .optim import OPTIMIZERS
from .states import trained_kinds

GROUPS = (32, 16, 8)
"""Tiles of a group where the tower keeps pixels alone: the most that does not cost the decoder anything. 8 tiles have 8192 patches of
14 x 14 pixels; with them a step of the 8B at 32K took 5.5 to 6.0 s where `recompute` took 5.2 (H100, 2026-11-28)."""
MLP_ROWS = 32768
"""Tokens of a block where the decoder's MLPs work on blocks: large enough for its matrix products, and by arithmetic adding up
the weight gradients in float32 takes about 1 % of their time (not measured apart)."""


def rank_tokens(config: Config, stage: StageConfig) -> int:
    """Tokens of the longest pack of a stage that one rank holds, at most."""
    share = -(-stage.max_tokens // config.parallel.group_size)
    return math.ceil(share * WHOLE_ROWS) if config.parallel.context == "auto" else share


def other_sums(config: Config, ranks: int) -> tuple[tuple[int, ...], int | None]:
    """Sizes of groups of tiles, and of blocks of the MLPs' tokens, that `selective` and `offload` may choose: weight gradients are then
    other sums.

    None with `run.deterministic`, where nothing that memory decides may change a bit. No groups on several ranks, which would gather the
    tower's sharded parameters for every group and have different numbers of groups; no blocks where the decoder's products are of 8-bit
    floats.
    """
    if config.run.deterministic:
        return (), None
    return GROUPS if ranks == 1 else (), None if "language" in config.model.fp8 else MLP_ROWS


def least_plan(config: Config, stage: StageConfig, described: Any, ranks: int) -> MemoryPlan:
    """What a step over the longest pack of a stage needs at least; with `keep`, more than that."""
    plan = partial(stage_plan, config, stage, described, ranks)
    if config.model.activations not in ("selective", "offload"):
        return plan()
    groups, rows = other_sums(config, ranks)
    tower = shapes(config, stage, described)[1]
    depth = tower.depth if tower.learns else 0
    towers: list[dict[str, Any]] = [{}, *({"vision_group": group, "vision_kept": Kept.all(depth)} for group in groups if depth)]
    return min((plan(mlp_rows=some, **one) for one in towers for some in (None, rows)), key=lambda found: found.gpu)


def stage_plans(config: Config, described: Any, ranks: int) -> dict[str, MemoryPlan]:
    """`least_plan` of every stage, by name."""
    return {stage.name: least_plan(config, stage, described, ranks) for stage in config.stages}


def planned(config: Config, described: Any, ranks: int) -> MemoryPlan:
    """The least plan of the stage that needs most."""
    return max(stage_plans(config, described, ranks).values(), key=lambda plan: plan.gpu)


def part_training(config: Config, stage: StageConfig, part: Part) -> Training:
    """How a stage trains a part. Adapters and weights in 4 bits are in the model in every stage."""
    lora = config.adapters.get(part)
    return Training(
        mode=stage.modes[part],
        rank=0 if lora is None else lora.rank,
        targets=None if lora is None or lora.targets is None else tuple(lora.targets),
        quantized=part in config.model.quantize,
        float8=part in config.model.fp8,
    )


def shapes(config: Config, stage: StageConfig, described: Any) -> tuple[DecoderShape, VisionShape]:
    """Sizes of the model in a stage, with the longest pack."""
    vision, connector, language = (part_training(config, stage, part) for part in ("vision", "connector", "language"))
    tower = vision_shape(described, rank_tokens(config, stage), training=vision, connector=connector)
    return decoder_shape(described, language), tower


def trained_parameters(config: Config, stage: StageConfig, described: Any) -> dict[Part, int]:
    """Parameters of each part that a stage trains."""
    decoder, tower = shapes(config, stage, described)
    connector = tower.connector_total(decoder.hidden)
    return {"vision": tower.total.trained, "connector": connector.trained, "language": decoder.total.trained}


def averaged_parameters(config: Config, described: Any) -> int:
    """Parameters that at least one stage trains: a part in full, its adapters, or both."""
    trained = {}
    for stage in config.stages:
        trained |= {(part, stage.modes[part]): count for part, count in trained_parameters(config, stage, described).items()}
    return sum(trained.values())


def stage_plan(
    config: Config,
    stage: StageConfig,
    described: Any,
    ranks: int,
    *,
    kept: Kept | None = None,
    vision_kept: Kept | None = None,
    vision_group: int | None = None,
    mlp_rows: int | None = None,
) -> MemoryPlan:
    """What a step over the longest pack of a stage needs on each of `ranks` ranks, with a checkpoint a layer (so not for `keep`).

    kept, vision_kept, vision_group: what decoder and vision tower keep (default: inputs of layers alone). mlp_rows: tokens that MLPs of the
    decoder work on at a time.
    """
    average = averaged_parameters(config, described) if config.model.ema is not None else 0
    compute, weights = (2 if config.parallel.dtype == "bfloat16" else 4), (2 if config.model.weights == "bfloat16" else 4)
    shards = max(1, ranks // replicas_of(config.parallel, ranks))
    summed = stage.packs_per_step > ranks // config.parallel.group_size
    decoder, tower = shapes(config, stage, described)
    kinds = trained_kinds(decoder, tower)
    return plan_memory(
        decoder,
        rank_tokens(config, stage),
        vision=tower,
        weight_bytes=weights,
        gradient_bytes=4 if summed else weights,
        reduction_bytes=4,
        optimizer_bytes=OPTIMIZERS[stage.optimizer].states(kinds) / max(1, sum(kinds)),
        kept_bytes=4 * average // shards,
        compute_bytes=compute if ranks > 1 or compute != weights else None,
        activation_bytes=compute,
        gradients_kept=summed,
        offload=config.model.activations == "offload",
        kept=kept,
        vision_kept=vision_kept,
        vision_group=vision_group,
        mlp_rows=mlp_rows,
        exchanged=config.parallel.ulysses > 1 or config.parallel.context == "auto",
        shards=shards,
    )
