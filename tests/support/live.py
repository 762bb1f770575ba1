"""Bytes of tensors that are alive, counted at every operation, and what is stored for backward: what a memory planner predicts, measured
without a GPU."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations inside have made. `now`: bytes that are alive; `peak`: the most after any operation.

    A launch in Triton's interpreter leaves a cycle that holds its arguments, which Python 3.13 collects a third as often as 3.11: there,
    garbage is collected at every operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __enter__(self) -> LiveBytes:
        if self._interpreted:
            gc.freeze()  # what is there is not searched again and again
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._interpreted:
            gc.unfreeze()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._interpreted:
            gc.collect()
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and (storage := one.untyped_storage())._cdata not in given:
                self._seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        self._seen = {key: (ref, size) for key, (ref, size) in self._seen.items() if not ref.expired()}
        return sum(size for _, size in self._seen.values())

    def settled(self, seconds: float = 0.25, limit: float = 10.0) -> int:
        """`now`, once it has not changed for `seconds`, at most `limit` seconds from now: gloo's threads hold the tensors of a collective
        for a while after it has ended, on a loaded machine a long one."""
        alive, since, end = self.now, time.monotonic(), time.monotonic() + limit
        while time.monotonic() < min(since + seconds, end):
            time.sleep(0.01)
            if self.now != alive:
                alive, since = self.now, time.monotonic()
        return alive


@contextmanager
def saved_shapes() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of all tensors that operations inside store for backward, as a list that grows."""
    shapes: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield shapes
