"""Activation checkpointing of a run (`model.activations`), and the host memory that `offload` needs.

The host memory is one pinned arena for the whole run, sized for the longest pack of its longest stage. Pinning takes half a second per GiB,
and a run for which there is not enough is refused before its first step.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from eagle_kernels import OffloadEngine
from eagle_kernels.offload import ALIGNMENT, GIB, available_host_bytes
from eagle_train.config import Config, ConfigError
from eagle_train.distributed.world import World

from .step_memory import stage_plans

Mode = Literal["keep", "recompute", "selective", "offload"]


def activation_mode(config: Config, device: torch.device) -> Mode:
    """`model.activations`; auto is selective on a GPU, where packs are long (and offload in stages that do not fit with it:
    `selection.choose`), and keeps everything on a CPU."""
    if config.model.activations == "auto":
        return "selective" if device.type == "cuda" else "keep"
    return config.model.activations


def resolved(config: Config, device: torch.device) -> Config:
    """With `model.activations: auto` as it is on a device."""
    return with_activations(config, activation_mode(config, device))


def with_activations(config: Config, mode: Mode) -> Config:
    """With `model.activations: <mode>`."""
    return config.replaced(model=config.model.replaced(activations=mode))


def host_bytes(config: Config, described: Any) -> int:
    """Host memory that one rank needs: all decoder layers' inputs but the last one's, for the longest pack's share of a context rank."""
    # Every place in the arena starts at a multiple of its alignment.
    most = max(plan.host for plan in stage_plans(with_activations(config, "offload"), described, 1).values())
    return most + ALIGNMENT * described.text_config.num_hidden_layers


def make_engine(config: Config, described: Any, world: World, *, available: int | None = None) -> OffloadEngine:
    """The engine for all stages of `config`, with `offload`; called on all ranks together.

    available: bytes that this host can spare for all of its ranks; None asks the system. Raises ConfigError, on every rank, when one host
    has less than its ranks need.
    """
    need = host_bytes(config, described)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    available = available_host_bytes() if available is None else available
    # Everyone has looked before anyone takes: what one rank takes would be missing from what the next one finds.
    for rank, (ranks, spare) in enumerate(world.gather((local, available))):
        if spare is not None and ranks * need > spare:
            layers, longest = described.text_config.num_hidden_layers, config.max_tokens
            raise ConfigError(
                f"model.activations is offload: the inputs of {layers - 1} layers at {longest} tokens take {need / GIB:.2f} GiB of host "
                f"memory per rank, {ranks * need / GIB:.2f} GiB for the {ranks} on the host of rank {rank}, which can spare "
                f"{spare / GIB:.2f} GiB; share packs over more ranks (parallel.ulysses, parallel.all_gather), "
                "lower stages.*.max_tokens, or choose recompute"
            )
    engine, failure = None, None
    try:
        engine = OffloadEngine(need, device=world.device, host_available=need)
    except MemoryError as error:  # a limit on pinned memory, on this host
        failure = str(error)
    if failures := world.failures(failure):
        raise ConfigError(f"model.activations is offload: {'; '.join(failures)}; or choose recompute")
    assert engine is not None
    return engine
