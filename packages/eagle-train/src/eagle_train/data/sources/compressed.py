"""Annotation files that are read from a local copy: compressed ones (`.gz`, `.zst`, `.bz2`, `.xz`), since reading a row in the middle needs
all before it, and Arrow files at an address, since they are mapped into memory.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from eagle_train.config import ConfigError
from eagle_train.config.addresses import scheme_of
from eagle_train.data.atomic import replacing
from eagle_train.data.files import identity_of, open_binary, version_of

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


def is_copied(path: str) -> bool:
    """Whether a file is read from a local copy."""
    return path.lower().endswith((*SUFFIXES, ".arrow") if scheme_of(path) else SUFFIXES)


def unpacked(path: str, folder: Path) -> str:
    """Path of the unpacked file in `folder`, which is made when it isn't there; its name changes with the file's size and time.

    Raises ConfigError for a file that is damaged.
    """
    size, version = version_of(path)
    inner = Path(path).name
    if path.lower().endswith(SUFFIXES):
        inner = inner.rpartition(".")[0]
    identity = f"{identity_of(path)} {size} {version}"
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
    file = open_binary(path)
    if suffix == ".zst":
        return pa.CompressedInputStream(pa.PythonFile(file), "zstd")
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix](file, "rb") if suffix in SUFFIXES else file
