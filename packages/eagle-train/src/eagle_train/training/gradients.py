"""Gradients of an optimizer step: where they are summed over the packs of a rank, and in whose memory.

Several packs are summed in float32, also for bfloat16 weights. Where FSDP2 shards parameters only a shard of the sum is held: every pack's
gradients are reduced in its backward. Replicas of the shards (HSDP) are summed once, after the last pack.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eagle_train.distributed.sharding import is_sharded


class Gradients:
    """Gradients of the trained parameters of a model, for steps of `packs` packs per rank. Make it when the model has its memory.

    replicas: groups of ranks that hold all shards; all ranks where `parallel.fsdp` is false.
    """

    def __init__(self, model: nn.Module, packs: int, replicas: int) -> None:
        self.model: Any = model
        self.packs = packs
        sharded = self._sharded = is_sharded(model)
        #: FSDP2 then sums packs itself, in float32.
        self._postponed = sharded and replicas > 1 and packs > 1
        self._float32 = packs > 1 and not self._postponed
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._trained if self._float32 else ():
            # None: any. FSDP2 assigns the first gradient in the weights' dtype (torch 2.11) or in float32 (2.15), and `_move` decides.
            parameter.grad_dtype = None if sharded else torch.float32  # pyright: ignore[reportAttributeAccessIssue]
        on_gpu = bool(self._trained) and self._trained[0].is_cuda
        self._stream = torch.cuda.current_stream() if on_gpu else None
        moves = sharded and (on_gpu or any(parameter.dtype != torch.float32 for parameter in self._trained))
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._move) for parameter in self._trained if moves]
        #: Parameters whose gradient of this step was moved.
        self._moved: set[int] = set()

    def begin(self, place: int) -> None:
        """Before forward of pack `place` of a step."""
        if place == 0:
            self._moved.clear()
        if self._postponed:
            self.model.set_requires_all_reduce(place == self.packs - 1)

    def close(self) -> None:
        """After the stage: the parameters are as before, without gradients, and nothing here refers to them."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._trained:
            parameter.grad = None
            if self._float32 and not self._sharded:
                parameter.grad_dtype = parameter.dtype  # pyright: ignore[reportAttributeAccessIssue]
        self.model, self._trained, self._hooks = None, [], []

    def _move(self, parameter: Tensor) -> None:
        """Called by FSDP2 when a gradient was reduced: takes the first one of a step to memory of its own.

        FSDP2 makes it in the memory of the reduction's stream. torch keeps freed memory for the stream that it was taken in, so there it
        would be no use to the activations of the next step: the 8B on one GPU came to hold 139 GiB with a plan of 127 (2026-11-28).
        """
        if id(parameter) in self._moved:  # FSDP2 added to what was moved
            return
        self._moved.add(id(parameter))
        gradient: Any = parameter.grad
        local = gradient.to_local()
        # The reduction's stream has waited for the work that can have used this memory before.
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            room = torch.empty_like(local, dtype=torch.float32 if self._float32 else parameter.dtype)
        room.copy_(local)
        mesh, placements = gradient.device_mesh, gradient.placements
        parameter.grad = DTensor.from_local(room, mesh, placements, run_check=False, shape=gradient.shape, stride=gradient.stride())
