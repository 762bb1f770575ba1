"""Files that one process makes and all processes of the host map: their pages are in memory once, whatever the number of ranks.

Who comes first makes the file and the others wait. It is written under another name and renamed, so what has the name is whole. The lock is
the kernel's: it ends with the process that holds it, also with kill -9, and the next one that waits makes the file anew. Where a file
system has no locks several processes may make the same file; the last one's takes the place of the others', which stay mapped.
Hosts with a disk of their own each make a file there; on a shared disk the first host makes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from .atomic import replacing
from .lock import waited_for

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAGIC = b"EagleArrays1\n"
_ALIGNED = 64


class Damaged(Exception):
    """A file is not what was written."""


def shared(path: Path, read: Callable[[Path], T], write: Callable[[BinaryIO], None]) -> T:
    """What `read` makes of `path`; when it isn't there, or `read` raises Damaged, `write` makes it. Raises OSError for a disk that is full
    or doesn't keep what was written."""
    for attempt in range(2):
        try:
            return read(path)
        except FileNotFoundError:
            pass
        except Damaged as error:
            logger.warning("%s is damaged and is made again: %s", path, error)
        path.parent.mkdir(parents=True, exist_ok=True)
        with waited_for(path.with_name(f"{path.name}.lock")) as held:
            if held:
                for leftover in path.parent.glob(f"{path.name}.*.tmp"):
                    leftover.unlink(missing_ok=True)
            if attempt or not _whole(path, read):
                with replacing(path) as file:
                    write(file)
    try:
        return read(path)
    except Damaged as error:
        raise OSError(f"{path}: was written and is damaged ({error}); check the disk") from error


def _whole(path: Path, read: Callable[[Path], object]) -> bool:
    """Whether another process made the file meanwhile."""
    try:
        read(path)
    except (FileNotFoundError, Damaged):
        return False
    return True


def shared_arrays(path: Path, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The one-dimensional arrays of the file, by name, as read-only views of it; `make` makes them when it isn't there."""
    return shared(path, read_arrays, lambda file: write_arrays(file, make()))


def write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a head (JSON: type, length and offset of each array, size of the file) and the arrays, each at a multiple of 64 bytes."""
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = (array.dtype.str, len(array), end)
        end += -(-array.nbytes // _ALIGNED) * _ALIGNED
    head = _MAGIC + json.dumps({"arrays": places, "bytes": end}).encode()
    file.write(head + b" " * (-(len(head) + 1) % _ALIGNED) + b"\n")
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.write(b"\0" * (-array.nbytes % _ALIGNED))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that `write_arrays` wrote. Raises FileNotFoundError, and Damaged."""
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise Damaged("it does not begin as a file of arrays does")
        try:
            line = file.readline()
            head = json.loads(line)
            places, size = head["arrays"].items(), head["bytes"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"its head can't be read: {error}") from error
        start = file.tell()
        whole = np.memmap(file, np.uint8, "r")
    if len(whole) != start + size or not line.endswith(b"\n"):
        raise Damaged(f"it has {len(whole)} bytes, {start + size} were written")
    bounds = {name: (start + offset, start + offset + length * np.dtype(kind).itemsize, kind) for name, (kind, length, offset) in places}
    return {name: whole[first:stop].view(kind) for name, (first, stop, kind) in bounds.items()}
