"""Compressed annotation files (`.gz`, `.zst`, `.bz2`, `.xz`): unpacked once, since reading a row in the middle needs all before it."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from eagle_train.config import ConfigError
from eagle_train.data.atomic import replacing

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


def unpacked(path: str, folder: Path) -> str:
    """Path of the unpacked file in `folder`, which is made when it isn't there; its name changes with the file's size and time.

    Raises ConfigError for a file that is damaged.
    """
    stat = os.stat(path)
    inner = Path(path).name.rpartition(".")[0]
    identity = f"{os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns}"
    target = folder / f"{hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}-{inner}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _opened(path) as source, replacing(target) as file:
                shutil.copyfileobj(source, file, 1 << 22)
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ConfigError(f"{path}: can't be unpacked: {error}; compress it again") from error
    return str(target)


def _opened(path: str) -> Any:
    suffix = Path(path).suffix.lower()
    if suffix == ".zst":
        return pa.CompressedInputStream(pa.OSFile(path), "zstd")
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix](path, "rb")
