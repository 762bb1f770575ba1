"""The ranks of a run and how they share it: data groups, context groups, and parameters sharded with FSDP2.

The loss of every rank is already divided by the global denominator, so gradients are summed, never averaged.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from eagle_cp import ContextMesh
from eagle_train.config import ConfigError, ParallelConfig

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a collective may wait: a rank may be reading a long video meanwhile."""


@dataclass
class World:
    """This process among the others. `data_rank` of `data` groups reads its own packs; a group's `context` ranks share each pack."""

    rank: int
    size: int
    device: torch.device
    data_rank: int
    data: int
    context: ContextMesh
    mesh: DeviceMesh | None
    owns_group: bool = field(default=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The (small, picklable) values of all ranks, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leave the process group, if it was made here."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self.owns_group = False


def start_world(config: ParallelConfig, device: str | None = None) -> World:
    """Join the ranks that torchrun started (or be the only one).

    device: `cpu` or `cuda`; None takes a GPU when there is one. Raises ConfigError when `config` doesn't fit the number of ranks.
    """
    size, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    context = config.context
    if size % context:
        raise ConfigError(f"parallel: ulysses {config.ulysses} x gather {config.gather} = {context} ranks don't divide the {size} that run")
    data = size // context
    if config.data is not None and config.data != data:
        raise ConfigError(
            f"parallel.data is {config.data}, but {size} ranks in groups of {context} make {data}; start {config.data * context} ranks"
        )
    if kind == "cuda":
        torch.cuda.set_device(local)
    here = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    owns = False
    sharded = size > 1 or config.dtype == "bfloat16"
    if sharded and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if size > 1:
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=here if kind == "cuda" else None)
        else:
            store = dist.FileStore(os.path.join(tempfile.mkdtemp(prefix="eagle-"), "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        owns = True
    mesh = None
    context_mesh = ContextMesh.single()
    if sharded:
        mesh = init_device_mesh(kind, (data, config.gather, config.ulysses), mesh_dim_names=("data", "gather", "ulysses"))
        if context > 1:
            context_mesh = ContextMesh.from_device_mesh(mesh["gather", "ulysses"])
    return World(rank, size, here, rank // context, data, context_mesh, mesh, owns)


def shard_model(model: nn.Module, world: World, config: ParallelConfig) -> nn.Module:
    """FSDP2 over all ranks: a unit for every layer, one for the rest; master weights float32, computation in `config.dtype`.

    Ranks of a context group see the same parameters and other tokens, so for parameters they are data ranks too.
    With `config.fsdp` false parameters are replicated and only gradients are summed. A single float32 rank stays as it is.
    """
    if world.mesh is None:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False)
    shape = (1, world.size) if config.fsdp else (world.size, 1)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if config.fsdp else mesh
    layers = [*model.language_model.model.layers, *model.vision_model.vision_model.encoder.layers]  # type: ignore[union-attr]
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        # A single rank sums what it alone has: a factor would only cost a copy of every gradient.
        if world.size > 1 and hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters."""
    return hasattr(model, "set_requires_gradient_sync")
