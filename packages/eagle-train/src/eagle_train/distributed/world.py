"""The ranks of a run and how they share it: data parallel groups, each of one or more context parallel ranks."""

from __future__ import annotations

import atexit
import ctypes
import datetime
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from eagle_cp import ContextMesh, Layout, plan_context
from eagle_cp.planner import Hardware
from eagle_model.language.spec import head_dim
from eagle_train.config import ConfigError, ParallelConfig
from eagle_train.errors import TrainError

from .failure import is_lost, leave
from .precision import auto_dtype

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a collective may wait: a rank may be reading a long video meanwhile."""
PATIENCE = datetime.timedelta(days=7)
"""How long ranks wait for work of the main rank: it may be measuring a hundred million rows."""

SETTLE = 0.25
"""Seconds before a rank's interpreter ends (`_settle`)."""

T = TypeVar("T")


FAILED_PATIENCE = datetime.timedelta(seconds=60)
"""How long a rank that failed waits for the others: one that waits for it inside a collective of the model never comes."""


class RankError(TrainError, RuntimeError):
    """A rank can't continue, and without it no rank can."""


class MainRankError(RankError):
    """The main rank stopped, which it reports itself."""

    on_every_rank = True


class DeviceError(ConfigError):
    """The requested device can't be used by this rank; other ranks may have one."""

    on_every_rank = False


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
    patient: dist.ProcessGroup | None = field(default=None, repr=False)
    #: Of the job, where ranks publish what they do; None: there is only one rank, or others made the process group.
    store: dist.Store | None = field(default=None, repr=False)  # pyright: ignore[reportPrivateImportUsage]
    #: With `parallel.context: auto`, the same ranks as `context` in every split, by the size of the Ulysses level.
    splits: Mapping[int, ContextMesh] = field(default_factory=dict, repr=False)
    #: Rates that splits are chosen by; None: those of `eagle_cp.planner.Hardware`.
    hardware: Hardware | None = field(default=None, repr=False)
    #: How many packs were split in which way, with `parallel.context: auto`.
    chosen: Counter[str] = field(default_factory=Counter, repr=False)
    _shards: dict[int, DeviceMesh] = field(default_factory=dict, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def layout(self, cu_seqlens: Sequence[int], text_config: Any, prefixes: Sequence[int] = ()) -> Layout:
        """How the ranks of a context parallel group share a pack: a function of the arguments, so that all of them decide alike.

        text_config: of the language model, for its sizes. prefixes: of a `PackedBatch`.
        """
        if self.context.size == 1:
            return Layout.single(cu_seqlens, prefixes or None)
        heads = {"num_heads": text_config.num_attention_heads, "num_kv_heads": text_config.num_key_value_heads}
        mesh, whole = self.context, False
        if self.splits:
            width = head_dim(text_config)
            attention = width * 2 * (heads["num_heads"] + heads["num_kv_heads"])
            plan = plan_context(
                [stop - start for start, stop in pairwise(cu_seqlens)],
                self.context.size,
                prefixes=prefixes or None,
                whole=True,
                head_dim=width,
                hardware=self.hardware,
                token_flops=2.0 * text_config.hidden_size * (attention + 3 * text_config.intermediate_size),
                **heads,
            )
            mesh, whole = self.splits[plan.ulysses], plan.whole
            self.chosen["whole samples" if whole else f"ulysses {plan.ulysses} x all_gather {plan.all_gather}"] += 1
        return Layout.build(cu_seqlens, mesh, prefixes=prefixes or None, whole=whole, **heads)

    def shards(self, replicas: int) -> DeviceMesh:
        """All ranks as `replicate` groups of `shard` neighbouring ranks. Made once: process groups take memory of a GPU, and every stage
        that trains other parts shards a new model."""
        if replicas not in self._shards:
            shape = replicas, self.size // replicas
            self._shards[replicas] = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        return self._shards[replicas]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def first(self, work: Callable[[], T]) -> T | None:
        """Call `work` on the main rank while the others wait, for days if need be. Returns its result there and None elsewhere.

        What `work` raises is raised on the main rank, and RankError with the same message on the others; a main rank that is killed
        ends them too.
        """
        if self.size == 1:
            return work()
        failure: list[str | None] = [None]
        if not self.is_main:
            dist.broadcast_object_list(failure, src=0, group=self.patient)
            if failure[0] is not None:
                raise MainRankError(f"rank 0 stopped: {failure[0]}")
            return None
        try:
            result = work()
        except Exception as error:
            dist.broadcast_object_list([str(error) or type(error).__name__], src=0, group=self.patient)
            raise
        dist.broadcast_object_list(failure, src=0, group=self.patient)
        return result

    def gather(self, value: Any, *, patient: bool = False) -> list[Any]:
        """The (small, picklable) values of all ranks, on all ranks. patient: wait for days if need be."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient if patient else None)
        return values

    def failures(self, own: str | None) -> list[str]:
        """Failures as `rank N: ...`, on all ranks the same; empty when `own` is None everywhere. A collective of all ranks.

        Raises RankError on a rank that failed when the others don't arrive within `FAILED_PATIENCE`: they wait for it in another collective
        (for example in a layer of a sharded model), and the process group can't be used again.
        """
        if self.size == 1:
            return [] if own is None else [own]
        failed = torch.zeros(self.size, dtype=torch.int32)
        failed[self.rank] = own is not None
        # On a group of its own, so that it never meets a collective of the model.
        work = dist.all_reduce(failed, group=self.patient, async_op=True)
        assert work is not None
        try:
            work.wait(PATIENCE if own is None else FAILED_PATIENCE)
        except RuntimeError as error:
            if own is None:
                raise RankError(f"rank {self.rank} lost another rank ({error}); see the message of that rank") from error
            # gloo's thread still waits in the collective, and the destructor of the group would wait for that thread: the process would
            # hang while it exits. One reference that nothing drops keeps the destructor from running.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.patient))
            raise RankError(
                f"rank {self.rank} failed while the others waited for it in a collective: {own}. The run ends here; "
                "the same command continues from the newest checkpoint"
            ) from error
        if not failed.any():
            return []
        return [f"rank {rank}: {text}" for rank, text in enumerate(self.gather(own)) if text is not None]

    def close(self) -> None:
        """Leave the process group, if it was made here. In a `finally` clause: the error that is on its way decides which rank reports
        it (`failure.leave`)."""
        error = sys.exc_info()[1]
        failed = error if isinstance(error, Exception) and self.size > 1 else None
        if failed is not None and not is_lost(failed):
            leave(self.store, self.rank, failed)  # before the others notice
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self.owns_group = False
        if failed is not None and is_lost(failed):  # which can take seconds
            leave(self.store, self.rank, failed)


def _settle() -> None:
    """Before the interpreter ends: gloo's threads drop the tensors of the last collective a moment after it is complete.

    With torch 2.11 runs on a loaded machine ended with SIGABRT now and then, after everything was done: a thread that needs the
    interpreter while it ends can't have it.
    """
    time.sleep(SETTLE)


def device_kind(device: str | None) -> str:
    """`cpu` or `cuda`: the requested one, or a GPU when there is one. Raises ConfigError for another name, or without a GPU."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r}: expected cpu or cuda; CUDA_VISIBLE_DEVICES chooses the GPU")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda': torch finds no GPU; eagle doctor prints what is installed")
    return device


def alone(device: str | None = None) -> World:
    """This process as the only rank, also under torchrun. Raises ConfigError for another device."""
    return World(0, 1, torch.device(device_kind(device)), 0, 1, ContextMesh.single(), None)


def for_evaluation(config: ParallelConfig, *, ulysses: int = 1, all_gather: int = 1) -> ParallelConfig:
    """How ranks evaluate a trained model, whatever it was trained on: the whole model on every rank, in float32.

    ulysses, all_gather: ranks that share a pack of teacher-forced scoring.
    """
    whole = {"dtype": "float32", "data": None, "replicate": 1, "context": "fixed"}
    return config.model_copy(update=whole | {"ulysses": ulysses, "all_gather": all_gather})


def start_world(config: ParallelConfig, device: str | None = None) -> World:
    """Join the ranks that torchrun started (or be the only one).

    device: `cpu` or `cuda`; None takes a GPU when there is one. Raises ConfigError for another device, and when `config` doesn't fit the
    number of ranks.
    """
    size, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    kind = device_kind(device)
    context = config.group_size
    if size % context:
        raise ConfigError(
            f"parallel: ulysses {config.ulysses} x all_gather {config.all_gather} = {context} ranks don't divide the {size} that run"
        )
    data = size // context
    if config.data is not None and config.data != data:
        raise ConfigError(
            f"parallel.data is {config.data}, but {size} ranks in groups of {context} make {data}; start {config.data * context} ranks"
        )
    if size % config.replicate:
        raise ConfigError(f"parallel.replicate is {config.replicate}, which does not divide the {size} ranks that run")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise DeviceError(f"local rank {local} finds no GPU of its own, there are {torch.cuda.device_count()}; start fewer ranks here")
        torch.cuda.set_device(local)
    here = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    owns, store = False, None
    dtype = auto_dtype(kind) if config.dtype == "auto" else config.dtype
    sharded = size > 1 or dtype == "bfloat16"
    if sharded and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if size > 1:
            store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
            device_id = here if kind == "cuda" else None
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id)
            store = dist.PrefixStore("eagle", store)
            atexit.unregister(_settle)
            atexit.register(_settle)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        owns = True
    patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    mesh = None
    context_mesh = ContextMesh.single()
    if sharded:
        mesh = init_device_mesh(kind, (data, config.all_gather, config.ulysses), mesh_dim_names=("data", "all_gather", "ulysses"))
        if context > 1:
            context_mesh = ContextMesh.from_device_mesh(mesh["all_gather", "ulysses"])
    splits = {}
    if config.context == "auto" and context > 1:
        group = context_mesh.context.process_group
        splits = {u: ContextMesh.from_group(group, ulysses=u) for u in range(1, context + 1) if context % u == 0}
    return World(rank, size, here, rank // context, data, context_mesh, mesh, owns, patient, store, splits)
