"""What every format of annotation files offers: where rows are, rows in order, and one row by its address."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from eagle_train.data.errors import RowError


class Shard(NamedTuple):
    """`rows` consecutive rows of a file. start, size: where they are, in the format's own unit (bytes, or row numbers).

    digest: of everything that a row says; equal digests have equal rows. The content of media files isn't part of it.
    """

    start: int
    size: int
    rows: int
    digest: str


class RawRow(NamedTuple):
    """A row as written. start, size: its address in the file. content: None for an empty line, the error for a row that can't be parsed."""

    start: int
    size: int
    content: dict[str, Any] | RowError | None


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class RowSource(Protocol):
    """The rows of one annotation file. A format is one class with these methods and one row of `FORMATS`.

    Rows are numbered from 1, in the order of the file. An address is a pair (start, size), which stays valid while the file stays the same.
    """

    def scan(self, sizes: Iterator[int], fingerprint: Digest) -> Iterator[Shard]:
        """All shards in order.

        sizes: rows of each shard (of the last one fewer, where the rows end), without end; a format may make shards smaller. fingerprint:
        gets everything that the rows say, independent of how they are divided into shards.
        Raises ConfigError for a file that isn't of this format.
        """
        ...

    def read(self, shard: Shard, max_bytes: int) -> Iterator[RawRow]:
        """The rows of a shard, in order; one of more than `max_bytes` bytes is a RowError `line-too-long`."""
        ...

    def get(self, start: int, size: int) -> dict[str, Any]:
        """One row by its address; raises RowError when something else is there now."""
        ...

    def name(self, row: int, start: int) -> str:
        """What row `row` (1-based) of the file is called in messages, for example `rows.jsonl:17`."""
        ...


def too_long(size: int, limit: int) -> RowError:
    """The error of a row of `size` bytes."""
    return RowError("line-too-long", f"{size} bytes, the limit is {limit} (data.limits.max_line_bytes)")
