"""JSONL: one JSON object per line. An address is a range of bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eagle_train.data.errors import RowError
from eagle_train.data.files import open_binary
from eagle_train.data.unique_keys import unique

from .protocol import Digest, RawRow, Shard, too_long

_CHUNK = 1 << 22


class Jsonl:
    """The lines of a file; empty lines are not rows, but they are counted, so that line numbers are those of an editor."""

    def __init__(self, path: str) -> None:
        self.path = path

    def scan(self, sizes: Iterator[int], fingerprint: Digest) -> Iterator[Shard]:
        digest, start, size, lines = hashlib.blake2b(digest_size=20), 0, 0, 0
        wanted = next(sizes)
        whole_line = True
        with open_binary(self.path, buffering=0) as file:
            while chunk := file.read(_CHUNK):
                fingerprint.update(chunk)
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
                begin = used = 0
                while len(ends) - used >= wanted - lines:
                    used += wanted - lines
                    stop = int(ends[used - 1]) + 1
                    digest.update(chunk[begin:stop])
                    size += stop - begin
                    yield Shard(start, size, wanted, digest.hexdigest())
                    digest, start, size, lines, begin = hashlib.blake2b(digest_size=20), start + size, 0, 0, stop
                    wanted = next(sizes)
                lines += len(ends) - used
                digest.update(chunk[begin:])
                size += len(chunk) - begin
                whole_line = chunk.endswith(b"\n")
        if size:
            yield Shard(start, size, lines + (not whole_line), digest.hexdigest())

    def read(self, shard: Shard, max_bytes: int) -> Iterator[RawRow]:
        with open_binary(self.path) as file:
            file.seek(shard.start)
            start = shard.start
            for _ in range(shard.rows):
                line = file.readline(max_bytes + 1)
                size = len(line)
                text = line.rstrip(b"\r\n")
                if size > max_bytes and not line.endswith(b"\n"):
                    while not line.endswith(b"\n") and (line := file.readline(_CHUNK)):
                        size += len(line)
                    yield RawRow(start, size, too_long(size, max_bytes))
                else:
                    yield RawRow(start, len(text), parsed(text) if text.strip() else None)
                start += size

    def get(self, start: int, size: int) -> dict[str, Any]:
        with open_binary(self.path) as file:
            file.seek(start)
            return parse_row(file.read(size))

    def name(self, row: int, start: int) -> str:
        return f"{Path(self.path).name}:{row}"


def parse_row(line: bytes) -> dict[str, Any]:
    """A line of JSONL as a dictionary; raises RowError("broken-json") otherwise."""
    try:
        row = json.loads(line, object_pairs_hook=unique)  # 2 microseconds a row for a key that is written twice
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise RowError("broken-json", f"{error}; the line starts with {line[:60]!r}") from error
    if not isinstance(row, dict):
        raise RowError("broken-json", f"the line is a {type(row).__name__}, expected an object")
    return row


def parsed(text: bytes) -> dict[str, Any] | RowError:
    """The row, or the error that it is."""
    try:
        return parse_row(text)
    except RowError as error:
        return error
