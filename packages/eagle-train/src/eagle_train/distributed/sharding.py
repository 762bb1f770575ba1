"""Parameters sharded over ranks with FSDP2. The loss of every rank is divided by the global denominator, so gradients are summed."""

from __future__ import annotations

import torch
from torch import nn

from eagle_train.config import ConfigError, ParallelConfig

from .world import World


def shard_model(model: nn.Module, world: World, config: ParallelConfig) -> nn.Module:
    """FSDP2 over all ranks: a unit for every layer, one for the rest; master weights float32, computation in `config.dtype`.

    Ranks of a context group have the same parameters and different tokens, so for parameters they are data ranks too.
    With `config.replicate` (HSDP) each group of neighbouring ranks holds all shards, and gradients are summed over the groups too; with
    `config.fsdp` false parameters are replicated and only gradients are summed. A model of one rank whose weights have the dtype of the
    computation stays as it is. Raises ConfigError when `config.dtype` isn't the precision that `world` was started for.
    """
    if config.dtype == "auto":
        raise ConfigError("parallel.dtype is auto; resolve it first (eagle_train.runs.folder.resolve_dtype)")
    if world.mesh is None and config.dtype == "bfloat16":
        raise ConfigError("the ranks were started for float32 and the run computes in bfloat16: call resolve_dtype before start_world")
    if world.mesh is None:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if world.size == 1 and all(parameter.dtype == dtype for parameter in model.parameters() if parameter.is_floating_point()):
        return model  # no copies, and gradients in the memory that activations use
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False)
    replicas = replicas_of(config, world.size)
    mesh = world.shards(replicas)
    mesh = mesh["shard"] if replicas == 1 and config.fsdp else mesh
    for block in model.blocks():  # type: ignore[operator]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        # On a single rank the sum is the gradient itself: a factor would only cost a copy of every gradient.
        if world.size > 1 and hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model


def replicas_of(config: ParallelConfig, ranks: int) -> int:
    """Groups of ranks, of `ranks`, that hold all parameters each."""
    return config.replicate if config.fsdp else ranks


def reshard(model: nn.Module) -> None:
    """Let FSDP2 give up the whole parameters that a forward pass without a backward pass left: the model has its shards as parameters."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters."""
    return hasattr(model, "set_requires_gradient_sync")
