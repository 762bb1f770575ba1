"""Annotation files: one pass finds where lines start and what the content hashes to; shards of lines are then read on their own."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eagle_train.config import ConfigError

from .atomic import read_json, replacing
from .sample import RowError

_CHUNK = 1 << 22


class Shard(NamedTuple):
    """`lines` lines from byte `offset` on; the first one is line `first_line` (1-based) of the file."""

    offset: int
    first_line: int
    lines: int


@dataclass(frozen=True)
class AnnotationIndex:
    """What one pass over a JSONL file found. `digest` is BLAKE2b of the content; `size` and `mtime_ns` say whether to look again."""

    size: int
    mtime_ns: int
    digest: str
    lines: int
    shard_rows: int
    shards: tuple[Shard, ...]


def index_annotation(path: Path, shard_rows: int, cache: Path) -> AnnotationIndex:
    """The index of a JSONL file, from `cache` when size and modification time still agree; bounded memory.

    Raises ConfigError when the file holds a JSON array.
    """
    stat = path.stat()
    known = cache / f"{hashlib.blake2b(str(path.resolve()).encode(), digest_size=12).hexdigest()}-{shard_rows}.json"
    content = read_json(known)
    if content is not None and (content["size"], content["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return AnnotationIndex(**{**content, "shards": tuple(Shard(*shard) for shard in content["shards"])})
    index = _scan(path, shard_rows, stat.st_mtime_ns)
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(known) as file:
        file.write(json.dumps(asdict(index)).encode())
    return index


def _scan(path: Path, shard_rows: int, mtime_ns: int) -> AnnotationIndex:
    digest = hashlib.blake2b(digest_size=20)
    starts = [0]  # byte offsets of lines 1, 1 + shard_rows, 1 + 2 * shard_rows, ...
    lines = size = 0
    last = b"\n"
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            if size == 0 and chunk.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                raise ConfigError(f"{path}: holds a JSON array; one row a line is expected: convert it with jq -c '.[]'")
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
            # Line n (0-based) starts behind the n-th newline; keep those with n a multiple of shard_rows.
            numbers = np.arange(lines + 1, lines + 1 + len(ends))
            starts.extend((ends[numbers % shard_rows == 0] + 1 + size).tolist())
            lines += len(ends)
            size += len(chunk)
            last = chunk[-1:]
    if last != b"\n":
        lines += 1
    shards = []
    for number, offset in enumerate(starts):
        count = min(shard_rows, lines - number * shard_rows)
        if count > 0:
            shards.append(Shard(offset, number * shard_rows + 1, count))
    return AnnotationIndex(size, mtime_ns, digest.hexdigest(), lines, shard_rows, tuple(shards))


def read_lines(path: Path, shard: Shard, max_bytes: int) -> Iterator[tuple[int, int, bytes | RowError]]:
    """(line number, offset, line without its newline) of a shard; an over-long line comes as the RowError that it is."""
    with open(path, "rb") as file:
        file.seek(shard.offset)
        offset = shard.offset
        for number in range(shard.first_line, shard.first_line + shard.lines):
            line = file.readline(max_bytes + 1)
            size = len(line)
            content: bytes | RowError = line.rstrip(b"\r\n")
            if size > max_bytes and not line.endswith(b"\n"):
                while not line.endswith(b"\n") and (line := file.readline(_CHUNK)):
                    size += len(line)
                content = RowError("line-too-long", f"{size} bytes, the limit is {max_bytes} (data.limits.max_line_bytes)")
            yield number, offset, content
            offset += size
