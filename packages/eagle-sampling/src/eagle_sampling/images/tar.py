"""Members of tar files: `{"tar": path, "member": name}`, optionally with the place of the content (`offset`, `size`, bytes).

Without a place the headers of the file are read once in a process.
"""

from __future__ import annotations

import os
import tarfile
from functools import lru_cache
from typing import Any

from ..files import check_regular, open_remote, open_stream, scheme_of
from ..limits import Limits, MediaError, printable, unreadable


def read_member(ref: dict[str, Any], root: str | os.PathLike[str] | None, limits: Limits) -> bytes:
    """The content of a member. Raises MediaError when the file or the member is missing, cut off, or over `limits.max_bytes`."""
    path, offset, size = find_member(ref, root)
    limits.check_bytes(size, _name(ref))
    try:
        if (remote := open_remote(path)) is not None:
            data = remote.read(offset, size)
            remote.close()
        else:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if len(data) != size:
        raise MediaError(f"{_name(ref)}: is cut off: {len(data)} of {size} bytes are there; copy the tar file again")
    return data


def find_member(ref: dict[str, Any], root: str | os.PathLike[str] | None) -> tuple[str, int, int]:
    """Path of the tar file, and offset and size of the member in it. Raises MediaError when there is none, or it is cut off."""
    path = _path(ref, root)
    offset, size = _place(ref, path)
    try:
        if (remote := open_remote(path)) is not None:
            whole = remote.size
            remote.close()
        else:
            whole = os.stat(path).st_size
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if offset + size > whole:
        raise MediaError(f"{_name(ref)}: is cut off: {max(whole - offset, 0)} of {size} bytes are there; copy the tar file again")
    return path, offset, size


def has_member(ref: dict[str, Any], root: str | os.PathLike[str] | None) -> bool:
    """Whether the tar file holds the member."""
    try:
        path = _path(ref, root)
        _place(ref, path)
        return scheme_of(path) is not None or os.path.isfile(path)
    except MediaError:
        return False


def _path(ref: dict[str, Any], root: str | os.PathLike[str] | None) -> str:
    if not isinstance(ref.get("tar"), (str, os.PathLike)) or not isinstance(ref.get("member"), str):
        raise MediaError(f"a reference into a tar file needs 'tar' (a path) and 'member' (a name); this one has {sorted(map(str, ref))}")
    return str(ref["tar"]) if scheme_of(str(ref["tar"])) else os.path.join(root or "", ref["tar"])


def _name(ref: dict[str, Any]) -> str:
    return printable(f"{ref['tar']}/{ref['member']}")


def _place(ref: dict[str, Any], path: str) -> tuple[int, int]:
    if "offset" in ref and "size" in ref:
        return int(ref["offset"]), int(ref["size"])
    try:
        if (remote := open_remote(path)) is not None:
            identity = remote.size, getattr(remote, "version", "")
            remote.close()
        else:
            check_regular(path)
            stat = os.stat(path)
            identity = stat.st_size, stat.st_mtime_ns
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    try:
        return _members(path, identity)[ref["member"].removeprefix("./")]
    except KeyError:
        raise MediaError(f"{_name(ref)}: the tar file has no such member") from None


@lru_cache(maxsize=8)
def _members(path: str, identity: tuple[int, int | str]) -> dict[str, tuple[int, int]]:
    """Place of every file in a tar file, (offset, size) by name."""
    stream = open_stream(path)
    try:
        with tarfile.open(path, "r:") if stream is path else tarfile.open(fileobj=stream, mode="r:") as tar:
            return {one.name.removeprefix("./"): (one.offset_data, one.size) for one in tar if one.isfile()}
    except (OSError, tarfile.TarError) as error:
        raise MediaError(f"{printable(path)}: can't be read as a tar file: {error}") from error
