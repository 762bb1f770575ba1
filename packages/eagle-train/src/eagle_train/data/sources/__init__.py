"""Annotation files of every format as one thing: rows with addresses.

`files_of` finds the files of a source, `open_rows` the format of a file, `index_file` where its rows are. A new format is one file next
to these, with a class that has the methods of `RowSource`, and one row of `FORMATS`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from eagle_train.config import ConfigError, Source

from ..recipe import is_pattern
from . import compressed
from .columnar import ArrowFile, Columnar
from .csv_table import CsvTable
from .json_array import JsonArray
from .jsonl import Jsonl, parse_row
from .protocol import Digest, RawRow, RowSource, Shard
from .tar import TarRows

__all__ = ["FORMATS", "Digest", "RawRow", "RowSource", "Shard", "files_of", "open_rows", "parse_row"]

FORMATS: dict[str, Callable[[str], RowSource]] = {
    "jsonl": Jsonl,
    "json": JsonArray,
    "parquet": Columnar,
    "arrow": ArrowFile,
    "csv": CsvTable,
    "tar": TarRows,
}
"""Formats by name, as `format_of` finds them."""

_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".tab": "csv", ".tar": "tar"}
_IN_FOLDERS = (".parquet", ".arrow", ".tar")


def files_of(source: Source, unpack: Path) -> list[str]:
    """The annotation files of a source in order: paths, patterns (`shards/*.parquet`, sorted by name), and folders of Parquet, Arrow or tar
    files, such as a saved `datasets` dataset. Compressed files are unpacked into the folder `unpack`.

    Raises ConfigError for what doesn't exist, a pattern or folder without files, and a file that is named twice.
    """
    given = source.annotation if isinstance(source.annotation, list) else [source.annotation]
    found: list[str] = []
    for path in given:
        found += _expanded(path)
    twice = {path for path in found if found.count(path) > 1} if len(found) < 1000 else set()
    if len(set(found)) != len(found):
        raise ConfigError(f"annotation names a file twice: {next(iter(twice), 'see the list')}; use repeat_time to repeat rows")
    return [compressed.unpacked(path, unpack) if path.lower().endswith(compressed.SUFFIXES) else path for path in found]


def _expanded(path: Path) -> list[str]:
    if path.is_dir():
        for suffix in _IN_FOLDERS:
            names = sorted(str(one) for one in path.rglob(f"*{suffix}") if not one.name.startswith((".", "cache-")))
            if names:
                return names
        if (path / "dataset_dict.json").exists():
            raise ConfigError(f"{path}: holds several splits; name one of its folders")
        raise ConfigError(f"annotation folder {path} has no files that end in {', '.join(_IN_FOLDERS)}")
    if path.exists():
        return [str(path)]
    if is_pattern(path):
        names = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not names:
            raise ConfigError(f"annotation pattern {path} matches no file; check the path")
        return names
    raise ConfigError(f"annotation file {path} does not exist; check the recipe's paths")


def format_of(path: str) -> str:
    """Name of a file's format: from its first bytes where they tell, else from its suffix; JSONL if nothing tells."""
    with open(path, "rb") as file:
        head = file.read(512)
    if (encoding := _other_encoding(head)) is not None:
        raise ConfigError(f"{path}: is {encoding} text, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 {Path(path).name} > new file")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1") or (suffix := Path(path).suffix.lower()) == ".arrow":
        return "arrow"
    if head[257:262] == b"ustar" or suffix == ".tar":
        return "tar"
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"PK\x03\x04", "zip")):
        if head.startswith(magic):
            suffixes = ", ".join(compressed.SUFFIXES)
            raise ConfigError(f"{path}: is compressed ({name}), and its name doesn't end in {suffixes}; rename or unpack it")
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    return "json" if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else "jsonl"


def _other_encoding(head: bytes) -> str | None:
    """Name of a text's encoding when it is UTF-16 or UTF-32; without a byte order mark by its zeros, since JSON begins with ASCII."""
    for mark, name in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if head.startswith(mark):
            return name
    first = head[:4]
    if len(first) < 4 or first.count(0) not in (2, 3):
        return None
    patterns: dict[tuple[int, ...], str] = {
        (1, 0, 0, 0): "UTF-32LE",
        (0, 0, 0, 1): "UTF-32BE",
        (1, 0, 1, 0): "UTF-16LE",
        (0, 1, 0, 1): "UTF-16BE",
    }
    return patterns.get(tuple(int(byte != 0) for byte in first))


def open_rows(path: str) -> RowSource:
    """The rows of a file; files stay open, as many as a process used last. Raises ConfigError for a file that isn't of its format."""
    stat = os.stat(path)
    return _opened(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=32)
def _opened(path: str, size: int, mtime_ns: int) -> RowSource:
    return FORMATS[format_of(path)](path)
