"""One block of host memory of exact size, pinned once, in which stored activations are allocated.

torch's pinned allocator rounds every request up to a power of two (a hidden state of 0.94 GiB uses 1 GiB, one of 1.1 GiB uses 2) and pins
memory during the step; pinning takes about half a second per GiB.
"""

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagle_kernels.offload.host_memory import available_host_bytes

ALIGNMENT = 4096
GIB = 1 << 30


def _unpin(address: int) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


class Arena:
    """`capacity` bytes of host memory, rounded up to a multiple of 4096. `take` allocates the lowest range that fits; `give` frees one."""

    def __init__(self, capacity: int, *, pin: bool, available: int | None = None) -> None:
        """pin: lock the memory for transfers by CUDA. available: bytes that the host has left; default: `available_host_bytes()`.

        Raises ValueError if `capacity` is below 1, and MemoryError with both sizes if less is available.
        """
        if capacity < 1:
            raise ValueError(f"Arena: capacity is {capacity} bytes, expected at least 1")
        available = available_host_bytes() if available is None else available
        if available is not None and capacity > available:
            raise MemoryError(
                f"Arena: {capacity / GIB:.2f} GiB of host memory are requested and {available / GIB:.2f} GiB are available; "
                "store fewer layers on the host (gpu_bytes), shorten the sequence, or shard it over more ranks"
            )
        self.capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        self._map = mmap.mmap(-1, self.capacity)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self.pinned = pin
        self.memory.zero_()  # allocates the pages with all threads; pinning then only locks them
        if pin:
            address = self.memory.data_ptr()
            runtime: Any = torch.cuda.cudart()
            code = runtime.cudaHostRegister(address, self.capacity, 0)
            if int(code) != 0:
                raise MemoryError(
                    f"Arena: CUDA cannot pin {self.capacity / GIB:.2f} GiB of host memory (error {int(code)}); "
                    "raise `ulimit -l` or request less"
                )
            weakref.finalize(self, _unpin, address)
        self._free: list[tuple[int, int]] = [(0, self.capacity)]  # (offset, size), by offset

    @property
    def free(self) -> int:
        """Bytes that are not allocated."""
        return sum(size for _, size in self._free)

    def take(self, nbytes: int) -> int:
        """Allocate `nbytes` and return their offset. Raises MemoryError with the free sizes if they do not fit."""
        size = -(-max(1, nbytes) // ALIGNMENT) * ALIGNMENT
        for index, (offset, length) in enumerate(self._free):
            if length >= size:
                if length == size:
                    del self._free[index]
                else:
                    self._free[index] = (offset + size, length - size)
                return offset
        largest = max((length for _, length in self._free), default=0)
        raise MemoryError(
            f"Arena: {nbytes / GIB:.3f} GiB do not fit: {self.free / GIB:.3f} of {self.capacity / GIB:.3f} GiB are free, the largest "
            f"range has {largest / GIB:.3f} GiB; create the engine with more host_bytes (plan_memory computes the number)"
        )

    def give(self, offset: int, nbytes: int) -> None:
        """Free the range at `offset`, allocated with the same `nbytes`."""
        size = -(-max(1, nbytes) // ALIGNMENT) * ALIGNMENT
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (offset, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """The memory at `offset` as a flat tensor of `count` elements."""
        return self.memory[offset : offset + count * dtype.itemsize].view(dtype)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The memory at `offset` as a tensor with a storage of its own, which torch can save."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)
