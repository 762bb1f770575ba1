"""Steps with the trainer's configuration: FSDP2, float32 weights and AdamW, on one rank or several."""

import dataclasses
from typing import Any

import torch

from benchmarks.results import Result
from eagle_kernels import Training, plan_memory
from eagle_model.memory import decoder_shape, vision_shape
from eagle_train.config import ParallelConfig, StageConfig
from eagle_train.distributed.sharding import shard_model
from eagle_train.distributed.world import start_world
from eagle_train.training.optim import make_optimizer, set_trainable

from .inputs import TEXT, described, make
from .measured import Moments
from .policies import run


def trained(result: Result, name: str, tokens: int, layers: int, frozen: bool, order: list[str]) -> None:
    """FSDP2 as in the trainer: float32 weights and states, computation in bf16."""
    parallel = ParallelConfig(dtype="bfloat16")
    world = start_world(parallel, "cuda")
    model = make(described(layers), torch.float32)
    config = model.config
    stage = StageConfig(name=name, max_tokens=tokens, train=["connector", "language"] if frozen else ["vision", "connector", "language"])
    set_trainable(model, stage.modes)
    model = shard_model(model, world, parallel)
    optimizer = make_optimizer(model, stage)
    shape, vision = decoder_shape(config), vision_shape(config, tokens - TEXT)
    vision = dataclasses.replace(vision, training=Training("frozen" if frozen else "full"))
    widths: dict[str, Any] = {"weight_bytes": 4, "gradient_bytes": 4, "optimizer_bytes": 8, "compute_bytes": 2, "shards": world.size}
    plans = {
        policy: plan_memory(shape, tokens, vision=vision, labelled=TEXT, offload=policy == "offload", **widths)
        for policy in ("recompute", "offload")
    }
    run(result, name, model, Moments(model), tokens, order, plans, optimizer)
    world.close()
