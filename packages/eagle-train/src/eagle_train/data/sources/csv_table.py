"""CSV and TSV with a header: a row is a record, an address is its range of bytes.

Cells are text; an empty cell says nothing. A cell that begins with `[` or `{` is parsed as JSON, so that a column can hold conversations
or lists of media.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from eagle_train.config import ConfigError
from eagle_train.data.errors import RowError
from eagle_train.data.files import open_binary

from .protocol import Digest, RawRow, Shard, too_long

csv.field_size_limit(1 << 30)


class CsvTable:
    """Records of a table, numbered from 1 without the header. Records end where the quotes are even; cells may have line breaks."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.delimiter = "\t" if path.lower().endswith((".tsv", ".tab")) else ","

    @cached_property
    def header(self) -> list[str]:
        """Names of the columns; raises ConfigError when the file has none, or one twice."""
        with open_binary(self.path) as file:
            _, record = next(_records(file), (0, b""))
        try:
            names = self._cells(record.removeprefix(b"\xef\xbb\xbf"))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(
                f"{self.path}: its first line can't be read ({error}); save it as UTF-8, with {self.delimiter!r} between cells"
            ) from error
        other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
        if other is not None:
            raise ConfigError(
                f"{self.path}: its first line has {other!r} between cells, {self.delimiter!r} is expected (a tab in .tsv, else a comma); "
                f"save it with {self.delimiter!r} between cells"
            )
        if not any(names) or len(set(names)) != len(names):
            raise ConfigError(f"{self.path}: the first line must name the columns, each once; it says {names}")
        return names

    def scan(self, sizes: Iterator[int], fingerprint: Digest) -> Iterator[Shard]:
        wanted = next(sizes)
        header = json.dumps(self.header).encode()
        fingerprint.update(header)
        start = end = count = 0
        digest = hashlib.blake2b(digest_size=20)
        with open_binary(self.path) as file:
            for begin, record in self._rows(file):
                if not count:
                    start, digest = begin, hashlib.blake2b(header, digest_size=20)
                digest.update(record)
                fingerprint.update(record)
                count, end = count + 1, begin + len(record)
                if count == wanted:
                    yield Shard(start, end - start, count, digest.hexdigest())
                    count, wanted = 0, next(sizes)
        if count:
            yield Shard(start, end - start, count, digest.hexdigest())

    def read(self, shard: Shard, max_bytes: int) -> Iterator[RawRow]:
        with open_binary(self.path) as file:
            file.seek(shard.start)
            for number, (begin, record) in enumerate(_records(file, shard.start)):
                if number == shard.rows:
                    return
                content: dict[str, Any] | RowError | None
                if len(record) > max_bytes:
                    content = too_long(len(record), max_bytes)
                elif not record.strip():
                    content = None
                else:
                    try:
                        content = self._row(record)
                    except RowError as error:
                        content = error
                yield RawRow(begin, len(record), content)

    def get(self, start: int, size: int) -> dict[str, Any]:
        with open_binary(self.path) as file:
            file.seek(start)
            return self._row(file.read(size))

    def name(self, row: int, start: int) -> str:
        return f"{Path(self.path).name}, record {row}"

    def _rows(self, file: Any) -> Iterator[tuple[int, bytes]]:
        records = _records(file)
        next(records, None)
        return records

    def _cells(self, record: bytes) -> list[str]:
        text = record.decode("utf-8").rstrip("\r\n")
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, strict=True), [])

    def _row(self, record: bytes) -> dict[str, Any]:
        try:
            cells = self._cells(record)
        except (UnicodeDecodeError, csv.Error) as error:
            raise RowError("broken-record", f"{error}; the record starts with {record[:60]!r}") from error
        if len(cells) != len(self.header):
            raise RowError("broken-record", f"has {len(cells)} cells, the header has {len(self.header)} columns")
        return {name: _value(cell) for name, cell in zip(self.header, cells) if cell != ""}


def _value(cell: str) -> Any:
    if cell[:1] in "[{":
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _records(file: Any, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(first byte, content with its end of line) of every record from the file's place on."""
    pending: list[bytes] = []
    quotes = 0
    start = offset
    for line in file:
        pending.append(line)
        quotes += line.count(b'"')
        offset += len(line)
        if quotes % 2 == 0:
            yield start, b"".join(pending)
            pending, quotes, start = [], 0, offset
    if pending:
        yield start, b"".join(pending)
