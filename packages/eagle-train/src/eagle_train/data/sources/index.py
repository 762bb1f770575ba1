"""The index of an annotation file: where its shards are and what they hash to, kept next to the facts."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from eagle_train.data.atomic import read_json, replacing
from eagle_train.data.files import identity_of, version_of

from . import open_rows
from .protocol import Shard


@dataclass(frozen=True)
class FileIndex:
    """What one pass over a file found. fingerprint: hash of all that its rows say. size, version: whether to look again; the version is the
    time of modification in ns, or the ETag of a remote file."""

    path: str
    size: int
    version: int | str
    fingerprint: str
    rows: int
    shard_rows: int
    shards: tuple[Shard, ...]

    def changed(self) -> bool:
        """Whether the file is another one than it was when this was made."""
        return version_of(self.path, fresh=True) != (self.size, self.version)


def index_path(path: str, shard_rows: int, cache: Path) -> Path:
    """Where the index of a file is kept."""
    return cache / f"{hashlib.blake2b(identity_of(path).encode(), digest_size=12).hexdigest()}-{shard_rows}.json"


def index_file(path: str, shard_rows: int, cache: Path) -> FileIndex:
    """The index of a file, from the folder `cache` when size and version still agree.

    An index of an earlier version of the file gives the sizes of shards: rows that are appended make shards of their own, and those before
    stay what they are.
    """
    size, version = version_of(path)
    known = index_path(path, shard_rows, cache)
    content = read_json(known)
    sizes: list[int] = []
    if content is not None and content.get("path") is not None:
        shards = tuple(Shard(*shard) for shard in content["shards"])
        if (content["size"], content.get("version")) == (size, version):
            return FileIndex(**{**content, "path": path, "shards": shards})
        sizes = [shard.rows for shard in shards]
    fingerprint = hashlib.blake2b(digest_size=20)
    shards = tuple(open_rows(path).scan(itertools.chain(sizes, itertools.repeat(shard_rows)), fingerprint))
    rows = sum(shard.rows for shard in shards)
    index = FileIndex(path, size, version, fingerprint.hexdigest(), rows, shard_rows, shards)
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(known) as file:
        file.write(json.dumps(asdict(index)).encode())
    return index
