"""How much host memory this process can still allocate (Linux)."""

import contextlib
from pathlib import Path

# Entries of memory.stat that the kernel reclaims when a control group reaches its limit: file pages, but not shared memory.
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that this process can still allocate, or None where that cannot be read.

    It is the smallest of the kernel's estimate (MemAvailable) and what the limits of the process's control group (version 2) and of its
    parents leave; page cache counts as free. root: root of the file system.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    for group in _control_groups(root):
        with contextlib.suppress(OSError, ValueError):  # the group is not visible, or has no limit ("max")
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            found.append(max(0, limit - used + _reclaimable(group)))
    return min(found) if found else None


def _control_groups(root: Path) -> list[Path]:
    """Folders of this process's group and its parents. The last is the root, in a container often the only one that is visible."""
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
