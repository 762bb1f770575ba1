"""Checkpoints that are written while training goes on.

`save` copies this rank's tensors into host memory and returns; a thread writes the copy (`torch.distributed.checkpoint.async_save`), and
the main rank gives the folder its name when all ranks have written theirs. At most one is in flight: the next `save` waits for it. What
can go wrong meanwhile (a full disk, a rank that is gone) is raised by `wait`, on every rank, and leaves the checkpoint before as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eagle_kernels.offload import ALIGNMENT, Arena
from eagle_train.distributed.world import World

from . import checkpoint
from .checkpoint import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn


_Place = tuple[str | int, ...]
"""Keys and indices on the way to a tensor of a state."""


class HostCopies:
    """Copies of a state in host memory, allocated once and written again by the next `stage`: the stager of `async_save`.

    Not torch's `DefaultStager`: in torch 2.11 it copies once and fails after that, and gives its memory back each time.
    pinned: page-locked memory, which a GPU fills while the host goes on. It is one range, whose pages all threads make: torch pins every
    tensor apart, at half a second per GiB.
    """

    #: What `async_save` asks of a stager: `stage` returns when all is copied, so there is nothing to wait for.
    should_synchronize_after_execute = False

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._arena: Arena | None = None
        self._memory: dict[_Place, torch.Tensor] = {}

    def stage(self, state_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """`state_dict` with every tensor in host memory and everything else copied, complete when this returns.

        Raises MemoryError where the host has too little.
        """
        import torch

        with torch.no_grad():
            tensors: dict[_Place, torch.Tensor] = {}
            _map(state_dict, (), lambda place, tensor: tensors.setdefault(place, tensor))
            self._allocate(tensors)
            copied = _map(state_dict, (), lambda place, tensor: self._memory[place].copy_(tensor, non_blocking=self.pinned))
        if self.pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def synchronize_staging(self) -> None:
        """Nothing: see `should_synchronize_after_execute`."""

    def close(self) -> None:
        """Give the memory back."""
        self._memory.clear()
        self._arena = None

    def _allocate(self, tensors: dict[_Place, torch.Tensor]) -> None:
        """Memory for `tensors`: what there is, where it has a place for each of them (a state without an optimizer after one with it)."""

        def fits(place: _Place, tensor: torch.Tensor) -> bool:
            memory = self._memory.get(place)
            return memory is not None and (memory.shape, memory.dtype) == (tensor.shape, tensor.dtype)

        if all(fits(place, tensor) for place, tensor in tensors.items()):
            return
        self.close()  # before more is taken
        whole = sum(-(-max(1, tensor.nbytes) // ALIGNMENT) * ALIGNMENT for tensor in tensors.values())
        self._arena = arena = Arena(max(1, whole), pin=self.pinned)
        for place, tensor in tensors.items():
            self._memory[place] = arena.tensor(arena.take(tensor.nbytes), tensor.shape, tensor.dtype)


def _map(value: Any, place: _Place, of_tensor: Callable[[_Place, torch.Tensor], torch.Tensor]) -> Any:
    """A state with every tensor of this rank replaced, and everything else copied."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if isinstance(value, Mapping):
        return {key: _map(part, (*place, key), of_tensor) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(part, (*place, index), of_tensor) for index, part in enumerate(value))
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if is_traceable_wrapper_subclass(value):  # DTensor: the part of this rank, in the same place of the whole
        names, context = value.__tensor_flatten__()
        parts = {name: getattr(value, name) for name in names}  # from torch 2.12 on also the mesh, which stays what it is
        parts |= {name: _map(part, (*place, name), of_tensor) for name, part in parts.items() if isinstance(part, torch.Tensor)}
        return type(value).__tensor_unflatten__(parts, context, value.size(), value.stride())
    return of_tensor(place, value)


class Saver:
    """Writes the checkpoints of a run under `folder` and applies its keep rule; `save` and `wait` are collectives of all
    ranks, and so is making one.

    background: False writes each checkpoint before `save` returns, without a copy in host memory.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, background: bool = True) -> None:
        self.folder, self.world, self.keep, self.background = folder, world, keep, background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="eagle-checkpoint")
        self._copies = HostCopies(pinned=world.device.type == "cuda")
        #: The group of the writing thread, so that its collectives never meet those of training. It is made here and not when it is
        #: needed: gloo makes a group together, and where a rank is killed meanwhile the others wait for it, until the launcher ends them.
        self._group = _new_group() if background and world.size > 1 else None
        self._running: tuple[Progress, Future[None]] | None = None

    @property
    def broken(self) -> bool:
        """Whether the checkpoint in flight has failed on this rank: `wait` will raise."""
        return self._running is not None and self._running[1].done() and self._running[1].exception() is not None

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        average: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write a checkpoint of the state as it is now, once the one before is complete. Raises as `wait` does."""
        import torch.distributed.checkpoint as dcp

        self.wait()
        temporary = checkpoint.begin(self.folder, progress, self.world)
        written: Any
        try:
            state = checkpoint.state_of(model, optimizer, average)
            if self.background:
                written = dcp.async_save(
                    state,
                    checkpoint_id=str(temporary),
                    async_stager=cast(Any, self._copies),  # the protocol has a private attribute
                    process_group=self._group,
                    no_dist=self.world.size == 1,
                )
            else:
                written = Future()
                dcp.save(state, checkpoint_id=str(temporary), no_dist=self.world.size == 1)
                written.set_result(None)
        except (Exception, dcp.api.CheckpointException) as error:  # `wait` compares it over the ranks
            written = Future()
            written.set_exception(error)
        self._running = progress, self._thread.submit(self._finish, progress, written)
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Return when no checkpoint is in flight. Raises WriteError on every rank when the last one could not be written."""
        if self._running is None:
            return
        (progress, future), self._running = self._running, None
        error = future.exception()
        failures = self.world.failures(None if error is None else checkpoint.why(self.folder, error))
        if failures:
            texts = [failure.partition(": ")[2] if self.world.size > 1 else failure for failure in failures]
            raise checkpoint.not_written(self.folder, progress, texts) from error

    def close(self) -> None:
        """Let the thread end what it writes, also when training ends with an error; not a collective, and nothing is raised."""
        self._thread.shutdown(wait=True)
        self._copies.close()

    def _finish(self, progress: Progress, written: Future[Any]) -> None:
        """In the thread: the folder's name and the keep rule, when all ranks have written."""
        try:
            written.result()
            if self.world.is_main:
                checkpoint.publish(self.folder, progress)
                checkpoint.keep_newest(self.folder, progress.stage, self.keep)
        except BaseException:
            if self.world.is_main:
                checkpoint.discard(self.folder, progress)
            raise


def _new_group() -> Any:
    import torch.distributed as dist

    from eagle_train.distributed.world import TIMEOUT

    return dist.new_group(backend="gloo", timeout=TIMEOUT)
