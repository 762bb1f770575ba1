"""Activation checkpointing whose stored inputs are moved to host memory and back while the GPU computes.

The tensors that the recomputation of one checkpointed call needs form a group. Forward copies group i to the host when group i + 1 begins,
so the last group stays on the GPU. Backward starts to fetch group i - 1 when it reaches group i, so two groups are on the GPU at a time.
Host memory comes from one pinned arena. The implementation uses autograd's saved-tensor hooks around `torch.utils.checkpoint` and
works with any function, with FSDP2 and with nested modules.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

from eagle_kernels.offload.arena import Arena

# Smaller tensors (positions, cu_seqlens) stay on their device: moving them costs launches and saves little memory.
SMALLEST_BYTES = 1 << 20

# torch's attention operators. With their outputs stored, recomputation skips the part that is quadratic in the length.
ATTENTION_OPERATORS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_flash_attention_forward",
)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class _Group:
    """Weak references to the tensors of one checkpointed call; the autograd graph owns them."""

    def __init__(self, previous: "_Group | None") -> None:
        self.previous = previous
        self.references: list[weakref.ref[_Stored]] = []

    def tensors(self) -> list["_Stored"]:
        return [stored for reference in self.references if (stored := reference()) is not None]


def _unchanged(value: Tensor, version: int) -> Tensor:
    """`value`, which stayed on its device. Raises RuntimeError if it was modified since: autograd does not check tensors behind hooks."""
    if value._version != version:
        raise RuntimeError(
            f"OffloadEngine: a checkpoint's argument (or a kept operator's output) of shape {tuple(value.shape)} was modified in place "
            "after the call, so recomputation would give other values; modify a copy instead"
        )
    return value


class _Resident:
    """A tensor that stays on its device: a small one, a parameter, or one of another device."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.version = value, value._version


class _Stored:
    """A tensor on the GPU (`value`), on the host (`offset`), or being copied back (`fetched`)."""

    def __init__(self, engine: "OffloadEngine", value: Tensor, group: _Group) -> None:
        self.engine, self.group = engine, group
        self.value: Tensor | None = value
        self.version = value._version
        # Strides are preserved, because attention returns permuted outputs and its backward may require them. A dense tensor is copied as
        # flat memory.
        if not _is_dense(value):
            self.value = value = value.contiguous()
            self.version = value._version
        self.shape, self.strides, self.dtype, self.device, self.nbytes = (
            value.shape,
            value.stride(),
            value.dtype,
            value.device,
            value.nbytes,
        )
        self.offset: int | None = None
        self.fetched: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.prefetched = False  # prefetched once; a second use fetches again
        self.counted = False  # part of the engine's gpu_bytes
        group.references.append(weakref.ref(self))

    def __del__(self) -> None:
        self.engine._forget(self)


class _Keep(TorchDispatchMode):
    """In forward: stores the outputs of `keep_operators`. In recomputation: returns them instead of running the operators."""

    def __init__(self, engine: "OffloadEngine", group: _Group, outputs: list[Any], replay: bool) -> None:
        super().__init__()
        self.engine, self.group, self.outputs, self.replay = engine, group, outputs, replay
        self.position = 0

    def __enter__(self) -> "_Keep":
        self.position = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in self.engine.keep_operators:
            return func(*args, **(kwargs or {}))
        if self.replay:
            out = self.outputs[self.position]
            self.position += 1
            return tree_map_only((_Stored, _Resident), self.engine._unpack, out)
        out = func(*args, **(kwargs or {}))
        self.outputs.append(tree_map_only(Tensor, lambda tensor: self.engine._store(_detached(tensor), self.group), out))
        return out


def _detached(tensor: Tensor) -> Tensor:
    """`tensor.detach()` with the tensor's own version counter.

    A dispatch mode runs below autograd, where views have version counters of their own and would miss in-place changes. torch's selective
    activation checkpointing excludes the same key.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class OffloadEngine:
    """Stores the arguments of checkpointed calls: the first `gpu_bytes` on the GPU, the rest in `host_bytes` of pinned memory.

    The memory is allocated once, here. keep_operators: names of operators (`ATTENTION_OPERATORS`, or "namespace::name" of a custom one)
    whose outputs are stored too, so that recomputation does not run them. host_available: bytes that the host has left; default:
    `available_host_bytes()`. With a CPU device, memory is not pinned and copies are synchronous.
    Raises MemoryError with both sizes if the host has too little memory, and ValueError for sizes out of range.
    """

    def __init__(
        self,
        host_bytes: int,
        *,
        gpu_bytes: int = 0,
        device: torch.device | str | None = None,
        keep_operators: Iterable[str] = (),
        host_available: int | None = None,
    ) -> None:
        if gpu_bytes < 0:
            raise ValueError(f"OffloadEngine: gpu_bytes is {gpu_bytes}, expected 0 or more")
        self.device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        self.arena = Arena(host_bytes, pin=self.cuda, available=host_available)
        self.gpu_bytes = gpu_bytes
        self.gpu_used = 0
        self.keep_operators = frozenset(keep_operators)
        self._out = torch.cuda.Stream(self.device) if self.cuda else None
        self._in = torch.cuda.Stream(self.device) if self.cuda else None
        self._copying: list[tuple[Tensor, torch.cuda.Event]] = []
        self._last: _Group | None = None

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, recomputed in backward from its stored arguments.

        Every tensor in `args` of at least 1 MiB is stored for every call. Tensors that all layers share belong in the function's closure.
        """
        if not torch.is_grad_enabled():
            return function(*args)
        group = self._begin()
        kept: list[Any] = []
        context: Callable[[], Any] = noop_context_fn
        if self.keep_operators:

            def first_and_again() -> tuple[_Keep, _Keep]:
                return _Keep(self, group, kept, replay=False), _Keep(self, group, kept, replay=True)

            context = first_and_again

        with saved_tensors_hooks(lambda tensor: self._pack(tensor, group), self._unpack):
            return checkpoint(function, *args, use_reentrant=False, context_fn=context)

    def _begin(self) -> _Group:
        """Begin a new group, and start to copy the tensors of the previous one to the host."""
        self._settle()
        previous = self._last
        while previous is not None and not previous.tensors():
            previous = previous.previous
        for stored in previous.tensors() if previous is not None else ():
            self._copy_out(stored)
        self._last = _Group(previous)
        return self._last

    def _settle(self) -> None:
        """Release the GPU memory of tensors that were copied to the host. Only the current stream waits for these copies, which began one
        group ago."""
        for _, event in self._copying:
            torch.cuda.current_stream(self.device).wait_event(event)
        self._copying.clear()

    def _pack(self, tensor: Tensor, group: _Group) -> _Stored | _Resident:
        movable = tensor.device.type == self.device.type and not isinstance(tensor, torch.nn.Parameter)
        return self._store(tensor, group) if movable else _Resident(tensor)

    def _unpack(self, packed: _Stored | _Resident) -> Tensor:
        return self._fetch(packed) if isinstance(packed, _Stored) else _unchanged(packed.value, packed.version)

    def _store(self, tensor: Tensor, group: _Group) -> _Stored | _Resident:
        if tensor.nbytes < SMALLEST_BYTES:
            return _Resident(tensor)
        stored = _Stored(self, tensor, group)
        if self.gpu_used + tensor.nbytes <= self.gpu_bytes:
            self.gpu_used += tensor.nbytes
            stored.counted = True
        return stored

    def _copy_out(self, stored: _Stored) -> None:
        """Start the copy to the host. The tensor's GPU memory is released when the next group begins."""
        if stored.value is None or stored.counted:
            return
        value, offset = _unchanged(stored.value, stored.version), self.arena.take(stored.nbytes)
        host = self.arena.view(offset, stored.shape.numel(), stored.dtype)
        value = value.as_strided((value.numel(),), (1,))
        if self._out is not None and self._in is not None:
            self._out.wait_stream(torch.cuda.current_stream(self.device))
            self._out.wait_stream(self._in)  # an earlier fetch may still read this range
            with torch.cuda.stream(self._out):
                host.copy_(value, non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._out)
            self._copying.append((value, event))
        else:
            host.copy_(value)
        stored.offset, stored.value = offset, None

    def _copy_in(self, stored: _Stored) -> None:
        """Start the copy from the host."""
        assert stored.offset is not None
        host = self.arena.view(stored.offset, stored.shape.numel(), stored.dtype)
        fetched = torch.empty(stored.shape.numel(), dtype=stored.dtype, device=stored.device)
        if self._in is not None and self._out is not None:
            # Queued work may still use the memory of the new buffer, and the copy to the host must be complete.
            self._in.wait_stream(torch.cuda.current_stream(self.device))
            self._in.wait_stream(self._out)
            with torch.cuda.stream(self._in):
                fetched.copy_(host, non_blocking=True)
                stored.arrived = torch.cuda.Event()
                stored.arrived.record(self._in)
        else:
            fetched.copy_(host)
        stored.fetched, stored.prefetched = fetched, True

    def _fetch(self, stored: _Stored) -> Tensor:
        """The tensor on its device, ready for the current stream. Also starts the copies of its group and of the group before it."""
        self._settle()
        if stored.offset is not None and stored.fetched is None:
            self._copy_in(stored)
        for group in (stored.group, stored.group.previous):
            for other in group.tensors() if group is not None else ():
                if other.offset is not None and not other.prefetched:
                    self._copy_in(other)
        if stored.value is not None:
            return _unchanged(stored.value, stored.version).detach()
        assert stored.fetched is not None
        if stored.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(stored.arrived)
        # Returned without keeping a reference: a second backward through the same graph fetches again.
        value, stored.fetched, stored.arrived = stored.fetched, None, None
        return value.as_strided(stored.shape, stored.strides)

    def _forget(self, stored: _Stored) -> None:
        if stored.fetched is not None and self._in is not None:
            stored.fetched.record_stream(self._in)  # prefetched and not used: its copy may still be running
        if stored.offset is not None:
            self.arena.give(stored.offset, stored.nbytes)
            stored.offset = None
        if stored.counted:
            self.gpu_used -= stored.nbytes
            stored.counted = False


def offload_checkpoint(function: Callable[..., Any], *args: Any, engine: OffloadEngine | None = None) -> Any:
    """`function(*args)`, recomputed in backward; with an engine the tensors in `args` are stored in host memory until then.

    Without an engine it is `torch.utils.checkpoint` (non-reentrant): the same result, with `args` stored on their devices.
    """
    if engine is None:
        return checkpoint(function, *args, use_reentrant=False)
    return engine.checkpoint(function, *args)
