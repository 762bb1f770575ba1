"""One block of host memory of exact size, pinned once, from which stored activations take their places.

torch's own pinned allocator rounds every request up to a power of two (a 0.94 GiB hidden state takes 1 GiB, a 1.1 GiB one takes 2) and pins
in the middle of a step; pinning costs about half a second per GiB.
"""

import contextlib
import mmap
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 4096
GIB = 1 << 30


# What the kernel takes back from a control group that reaches its limit, by the names of memory.stat: pages of files, not shared memory.
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can still get: the kernel's estimate, cut by the limits of its control group (version 2) and of those above
    it, where the page cache counts as free; None where neither can be read. root: of the file system."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    for group in _control_groups(root):
        with contextlib.suppress(OSError, ValueError):  # no such group here, or no limit ("max")
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            found.append(max(0, limit - used + _reclaimable(group)))
    return min(found) if found else None


def _control_groups(root: Path) -> list[Path]:
    """Folders of this process's group and of those above it. The last is the root, which in a container is often the only one it sees."""
    mount, path = root / "sys/fs/cgroup", "/"
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        path = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
    parts = [part for part in path.split("/") if part]
    if ".." in parts:  # outside of this container
        parts = []
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _reclaimable(group: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(size) for name, size in pairs if name in RECLAIMABLE)
    return 0


def _unpin(address: int) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


class Arena:
    """`capacity` bytes of host memory, pinned when CUDA is there. `take` and `give` hand out places; the lowest that fits comes first."""

    def __init__(self, capacity: int, *, pin: bool, available: int | None = None) -> None:
        """available: bytes the host can spare; asked from the system when None. Raises ValueError for a bad size, MemoryError with the
        numbers when the host has less than `capacity`."""
        if capacity < 1:
            raise ValueError(f"Arena: capacity is {capacity} bytes, expected at least 1")
        available = available_host_bytes() if available is None else available
        if available is not None and capacity > available:
            raise MemoryError(
                f"Arena: {capacity / GIB:.2f} GiB of host memory are asked for and {available / GIB:.2f} GiB are available; "
                "store fewer layers on the host (gpu_bytes), shorten the sequence, or shard it over more ranks"
            )
        self.capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        self._map = mmap.mmap(-1, self.capacity)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self.pinned = pin
        self.memory.zero_()  # touch the pages with all threads: pinning then only has to lock them
        if pin:
            address = self.memory.data_ptr()
            runtime: Any = torch.cuda.cudart()
            code = runtime.cudaHostRegister(address, self.capacity, 0)
            if int(code) != 0:
                raise MemoryError(
                    f"Arena: CUDA can't pin {self.capacity / GIB:.2f} GiB of host memory (error {int(code)}); "
                    "raise `ulimit -l` or ask for less"
                )
            weakref.finalize(self, _unpin, address)
        self._free: list[tuple[int, int]] = [(0, self.capacity)]  # (offset, size), by offset

    @property
    def free(self) -> int:
        return sum(size for _, size in self._free)

    def take(self, nbytes: int) -> int:
        """Offset of a free place of `nbytes`. Raises MemoryError with the numbers when there is none."""
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
            f"Arena: no place for {nbytes / GIB:.3f} GiB: {self.free / GIB:.3f} of {self.capacity / GIB:.3f} GiB are free, the largest "
            f"gap is {largest / GIB:.3f}; make the engine with more host_bytes (plan_memory says how many)"
        )

    def give(self, offset: int, nbytes: int) -> None:
        """Return a place taken with the same size."""
        size = -(-max(1, nbytes) // ALIGNMENT) * ALIGNMENT
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (offset, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """The place at `offset` as a flat tensor of `count` elements."""
        return self.memory[offset : offset + count * dtype.itemsize].view(dtype)
