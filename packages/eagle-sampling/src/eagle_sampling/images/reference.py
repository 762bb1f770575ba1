"""References to images: a path, bytes, a key in an LMDB, or a member of a tar file; what an error calls them, and their encoded bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

from ..files import check_local, check_regular, open_remote, read_whole, scheme_of
from ..limits import DEFAULT_LIMITS, Limits, MediaError, path_text, printable, unreadable
from ..lmdb import store
from . import tar

ImageRef: TypeAlias = "str | os.PathLike[str] | bytes | dict[str, Any]"

_ACCEPTED = 'the path of an image, its bytes, {"lmdb_file": ..., "lmdb_key": ...}, or {"tar": ..., "member": ...}'


def describe(ref: ImageRef) -> str:
    """The name of an image in messages: text that any stream can print. Raises TypeError for what is not a reference."""
    if isinstance(ref, (bytes, bytearray, memoryview)):
        return f"<{len(ref)} bytes>"
    if isinstance(ref, dict) and "tar" in ref:
        return printable(f"{ref['tar']}/{ref.get('member')}")
    if isinstance(ref, dict):
        return printable(f"{ref.get('lmdb_file')}[{ref.get('lmdb_key')!r}]")
    return printable(path_text(ref, _ACCEPTED))


def resolve(path: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> str:
    """`path`, below `root` when it is relative and there is a root. Raises TypeError for what is not a path."""
    text = path_text(path, _ACCEPTED)
    return join(root, text)


def join(root: str | os.PathLike[str] | None, path: str) -> str:
    """`path` below `root`; an address stays itself."""
    return path if root is None or scheme_of(path) else os.path.join(root, path)


def read_bytes(ref: ImageRef, *, root: str | os.PathLike[str] | None = None, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The encoded image.

    Raises:
        MediaError: it is missing, empty, unreadable, an address without an opener, or over `limits.max_bytes`.
        TypeError: `ref` is not a reference, for example an open file.
    """
    if isinstance(ref, (bytes, bytearray, memoryview)):
        data = bytes(ref)
    elif isinstance(ref, dict) and "tar" in ref:
        data = tar.read_member(ref, root, limits)
    elif isinstance(ref, dict):
        data = _from_lmdb(ref, root, store.get)
    else:
        path = resolve(ref, root)
        if (fetched := read_whole(path, limits)) is not None:
            return fetched
        try:
            check_regular(path)
            with open(path, "rb", buffering=0) as file:
                limits.check_bytes(os.fstat(file.fileno()).st_size, printable(path))
                data = file.readall()
        except MediaError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
    limits.check_bytes(len(data), describe(ref))
    return data


def exists(ref: ImageRef, *, root: str | os.PathLike[str] | None = None) -> bool:
    """True for bytes, for a path where a file is, and for a key that its LMDB holds. Raises MediaError for an incomplete LMDB reference."""
    if isinstance(ref, (bytes, bytearray, memoryview)):
        return True
    if isinstance(ref, dict) and "tar" in ref:
        return tar.has_member(ref, root)
    if isinstance(ref, dict):
        return _from_lmdb(ref, root, store.has)
    return is_there(resolve(ref, root))


def is_there(path: str) -> bool:
    """Whether a file is at a path or an address. Raises MediaError when access to an address is denied."""
    try:
        file = open_remote(path)
    except MediaError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    if file is not None:
        file.close()
        return True
    return os.path.isfile(path)


def _from_lmdb(ref: dict[str, Any], root: str | os.PathLike[str] | None, look: Callable[[str, str | bytes], Any]) -> Any:
    if "lmdb_file" not in ref or "lmdb_key" not in ref:
        raise MediaError(f"an LMDB image reference needs 'lmdb_file' and 'lmdb_key'; this one has {sorted(ref)}")
    if not isinstance(ref["lmdb_file"], (str, os.PathLike)):
        raise MediaError(f"{describe(ref)}: 'lmdb_file' must be a path")
    check_local(resolve(ref["lmdb_file"], root), "an LMDB is mapped into memory")
    try:
        return look(resolve(ref["lmdb_file"], root), ref["lmdb_key"])
    except MediaError:
        raise
    except ValueError as error:  # a path with a zero byte or a lone surrogate
        raise MediaError(f"{describe(ref)}: can't be opened: {error}") from error
