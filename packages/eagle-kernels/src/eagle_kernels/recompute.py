"""Activation checkpointing piece by piece: backward computes the marked pieces of a layer again, and everything else stays.

    with Recompute() as again:
        normed = again(norm, hidden)  # a piece: its result and what it saves inside are computed again from `hidden`
        q = project(normed)           # kept: q stays in memory; `normed`, which its backward reads, does not

Autograd's saved-tensor hooks see every tensor that an operation saves. One that shares memory with the result of a piece is replaced by a
reference to that piece; tensors that are saved inside a piece are replaced by their number; all others are kept. The first of these that
backward reads makes the piece run again, from arguments that were kept or are results of earlier pieces, which run again before it. So
it does not matter which operations or modules read the result of a piece, and operations that are kept (attention, matrix products,
collectives) run once, whether or not torch's dispatcher knows them. The graph is that of the forward pass: gradients are the same to the
bit wherever the pieces give the same result twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


def call(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`: takes the place of a `Recompute` where nothing is computed again."""
    return function(*arguments)


class _Held:
    """A tensor that stays."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"Recompute: a tensor of shape {tuple(self.tensor.shape)} that backward needs was modified in place after it was saved; "
                "modify a copy instead"
            )
        return self.tensor


class _Value:
    """A tensor that backward computes again: the result of a piece, or a tensor saved inside it."""

    __slots__ = ("__weakref__", "piece", "tensor")

    def __init__(self, piece: _Piece) -> None:
        self.piece: _Piece | None = piece
        self.tensor: Tensor | None = None

    def get(self) -> Tensor:
        if self.piece is not None:
            self.piece.run_again()
        assert self.tensor is not None
        return self.tensor


class _View:
    """Some elements of the memory of a result."""

    __slots__ = ("geometry", "value")

    def __init__(self, value: _Value, tensor: Tensor) -> None:
        self.value, self.geometry = value, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def get(self) -> Tensor:
        return self.value.get().as_strided(*self.geometry)


_Saved = _Held | _Value | _View
_Hold = Callable[[Tensor], Any]


class _Around(threading.local):
    """The piece that runs in this thread: what stands for a tensor that is saved inside it. A `Recompute` inside a piece keeps nothing
    itself: the piece around it computes again what the inner one would keep."""

    hold: _Hold | None = None


_around = _Around()


@contextmanager
def _saving(hold: _Hold) -> Iterator[None]:
    before, _around.hold = _around.hold, hold
    try:
        with saved_tensors_hooks(hold, _unpack):
            yield
    finally:
        _around.hold = before


def _unpack(saved: _Saved) -> Tensor:
    return saved.get()


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class _Piece:
    """One call of a function. It is alive as long as something that it computes again is, and runs again at most once."""

    def __init__(self, function: Callable[..., Any], arguments: list[tuple[Any, bool]], device: str) -> None:
        """arguments: each a value, or what stands for a tensor, and whether it needs a gradient."""
        self.function, self.arguments, self.device = function, arguments, device
        self.autocast = _autocast(device)
        self.saved = 0
        #: What backward may read: tensors saved inside by their number, results at -1, -2, ...
        self.values: WeakValueDictionary[int, _Value] = WeakValueDictionary()

    def value(self, place: int) -> _Value:
        found = self.values.get(place)
        if found is None:
            found = self.values[place] = _Value(self)
        return found

    def run_again(self) -> None:
        """Compute every value that is still needed."""
        counted = 0

        def keep(tensor: Tensor) -> None:
            nonlocal counted
            if (value := self.values.get(counted)) is not None:
                value.tensor = tensor.detach()
            counted += 1

        with ExitStack() as context:
            context.enter_context(torch.enable_grad())
            context.enter_context(_saving(keep))
            if _autocast(self.device) != self.autocast:
                enabled, dtype = self.autocast
                context.enter_context(torch.autocast(self.device, dtype, enabled))
            arguments = [
                one.get().detach().requires_grad_(needs) if isinstance(one, _Held | _Value | _View) else one
                for one, needs in self.arguments
            ]
            results = self.function(*arguments)
        if counted != self.saved:
            raise RuntimeError(
                f"Recompute: {getattr(self.function, '__name__', self.function)} saved {self.saved} tensors in forward and {counted} when "
                "backward ran it again; a piece must do the same both times"
            )
        for index, result in enumerate(results if isinstance(results, tuple) else (results,)):
            if (value := self.values.get(-1 - index)) is not None:
                value.tensor = result.detach()
        for value in list(self.values.values()):
            value.piece = None
        self.arguments = []


class Recompute:
    """A context manager around the forward pass of a layer; calls of it are the pieces that backward computes again.

    `again(function, *arguments)` gives `function(*arguments)`: a tensor or a tuple of tensors. Tensors that need a gradient must be
    arguments (or parameters), not variables that `function` finds elsewhere. `function` must do the same when it runs again; random
    numbers (dropout) are not repeated. Backward raises RuntimeError when a kept tensor was modified in place, or a piece saves another
    number of tensors the second time. Inside a piece, another `Recompute` keeps things from when the piece runs again.
    """

    def __init__(self) -> None:
        # Results of pieces by the address of their storage. The weak reference keeps the address from being used again.
        self._results: dict[int, tuple[StorageWeakRef, torch.dtype, _Piece, int]] = {}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hold: _Hold = _Held
        self._inside = False

    def __enter__(self) -> Recompute:
        self._hold = _around.hold or _Held
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._results.clear()

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        if self._inside or not torch.is_grad_enabled():
            return function(*arguments)
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        saved = [(self._pack(one), one.requires_grad) if isinstance(one, Tensor) else (one, False) for one in arguments]
        piece = _Piece(function, saved, tensors[0].device.type)
        given = {one.untyped_storage()._cdata for one in tensors}

        def number(tensor: Tensor) -> Any:
            place = piece.saved
            piece.saved += 1
            return self._pack(tensor) if tensor.untyped_storage()._cdata in given else piece.value(place)

        self._inside = True
        try:
            with _saving(number):
                results = function(*arguments)
        finally:
            self._inside = False
        for index, result in enumerate(results if isinstance(results, tuple) else (results,)):
            if isinstance(result, Tensor) and (storage := result.untyped_storage())._cdata not in given:
                self._results[storage._cdata] = StorageWeakRef(storage), result.dtype, piece, -1 - index
        return results

    def _pack(self, tensor: Tensor) -> Any:
        found = self._results.get(tensor.untyped_storage()._cdata)
        if found is None or found[1] != tensor.dtype:
            return self._hold(tensor)
        _, _, piece, place = found
        return _View(piece.value(place), tensor)
