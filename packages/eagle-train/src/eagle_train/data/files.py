"""Annotation files by path or address: opened, and told from other versions of themselves."""

from __future__ import annotations

import io
import os
from typing import Any, BinaryIO, cast

from eagle_train.config.addresses import scheme_of

from . import remote


def open_binary(path: str, *, buffering: int = -1) -> BinaryIO:
    """The file to read; of an address the parts that are read. Raises OSError, and for an address MediaError and MediaUnavailable."""
    if scheme_of(path) is None:
        return cast(BinaryIO, open(path, "rb", buffering=buffering))
    return cast(BinaryIO, io.BufferedReader(remote.open_stream(path), 1 << 16))


def version_of(path: str, *, fresh: bool = False) -> tuple[int, int | str]:
    """(size, what changes when the content does): time of modification in ns, or the ETag of an address, asked now if `fresh`."""
    if scheme_of(path) is not None:
        return remote.version_of(path, fresh=fresh)
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def identity_of(path: str) -> str:
    """The path without links, or the address."""
    return path if scheme_of(path) is not None else os.path.realpath(path)


def arrow_source(path: str) -> Any:
    """What pyarrow reads: the path, or the open file of an address."""
    return path if scheme_of(path) is None else open_binary(path)
