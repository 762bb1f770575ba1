"""Checkpoints that are written while training goes on.

`save` copies this rank's tensors into host memory and returns; a thread writes the copy (`torch.distributed.checkpoint.async_save`), and
the main rank gives the folder its name when all ranks have written theirs. At most one is in flight: the next `save` waits for it. What
can go wrong meanwhile (a full disk, a rank that is gone) is raised by `wait`, on every rank, and leaves the checkpoint before as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_train.distributed.world import World

from . import checkpoint
from .checkpoint import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn


class Saver:
    """Writes the checkpoints of a run under `folder` and applies its keep rule; `save` and `wait` are collectives of all
    ranks.

    background: False writes each checkpoint before `save` returns, without a copy in host memory.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, background: bool = True) -> None:
        self.folder, self.world, self.keep, self.background = folder, world, keep, background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="eagle-checkpoint")
        self._stager: Any = None
        #: The group of the writing thread, so that its collectives never meet those of training.
        self._group: Any = None
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
                    async_stager=self._staging(),
                    process_group=self._own_group(),
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
        if self._stager is not None:
            self._stager.close()
            self._stager = None

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

    def _staging(self) -> Any:
        """Copies into host memory that is allocated once: pinned where there is a GPU."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self._stager is None:
            gpu = self.world.device.type == "cuda"
            options = StagingOptions(use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu)
            self._stager = DefaultStager(options)
        return self._stager

    def _own_group(self) -> Any:
        import torch.distributed as dist

        from eagle_train.distributed.world import TIMEOUT

        if self._group is None and self.world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return self._group
