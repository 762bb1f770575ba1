"""Parquet files, and Arrow files as `datasets` saves them. An address is the number of a row, 0-based.

One row of a Parquet file is read by decoding its row group; the last one is kept. Arrow files are mapped, and only the row is copied.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagle_train.config import ConfigError
from eagle_train.data.errors import RowError
from eagle_train.data.files import arrow_source

from .protocol import Digest, RawRow, Shard, too_long

_BINARY = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_AT_ONCE = 64
"""Rows that become Python objects together."""


class Columnar:
    """Rows of a table, numbered from 1. `groups` are the pieces that are read at once."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._open()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path}: can't be read as {self.kind}: {error}") from error
        self.firsts = [0]
        for rows in self.group_rows:
            self.firsts.append(self.firsts[-1] + rows)
        self._lock = threading.Lock()
        self._kept: tuple[int, pa.Table] | None = None

    kind = "Parquet"
    group_rows: list[int]

    def _open(self) -> None:
        self._file = pq.ParquetFile(arrow_source(self.path), memory_map=True)
        metadata = self._file.metadata
        self.group_rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.schema = self._file.schema_arrow

    def _group(self, number: int) -> pa.Table:
        return self._file.read_row_group(number, use_threads=False)

    def _said(self, number: int) -> pa.Table:
        """A group without its binary values."""
        leaves = [self._file.schema.column(place) for place in range(len(self._file.schema))]
        said = [leaf.path for leaf in leaves if leaf.physical_type not in _BINARY or leaf.logical_type.type != "NONE"]
        return self._file.read_row_group(number, columns=said, use_threads=False)

    def scan(self, sizes: Iterator[int], fingerprint: Digest) -> Iterator[Shard]:
        """The digest covers all values except binary ones, which are media: of these it has the sizes of the columns."""
        names = json.dumps([str(field) for field in self.schema]).encode()
        fingerprint.update(names)
        for number, first in enumerate(self.firsts[:-1]):
            table = self._said(number)
            media = self._media_sizes(number)
            fingerprint.update(media)
            place = 0
            while place < self.group_rows[number]:
                count = min(next(sizes), self.group_rows[number] - place)
                digest = hashlib.blake2b(names + media, digest_size=20)
                for row in _python_rows(table.slice(place, count), count):
                    line = json.dumps(row, sort_keys=True, default=str).encode("utf-8", "backslashreplace") + b"\n"
                    digest.update(line)
                    fingerprint.update(line)
                yield Shard(first + place, count, count, digest.hexdigest())
                place += count

    def _media_sizes(self, number: int) -> bytes:
        group = self._file.metadata.row_group(number)
        columns = [group.column(place) for place in range(group.num_columns)]
        return json.dumps([[one.path_in_schema, one.total_compressed_size, one.num_values] for one in columns]).encode()

    def read(self, shard: Shard, max_bytes: int) -> Iterator[RawRow]:
        number = bisect_right(self.firsts, shard.start) - 1
        table = self._kept_group(number).slice(shard.start - self.firsts[number], shard.rows)
        for place, row in enumerate(_python_rows(table, shard.rows)):
            size = sum(len(value) for value in row.values() if isinstance(value, str | bytes))
            yield RawRow(shard.start + place, 1, row if size <= max_bytes else too_long(size, max_bytes))

    def get(self, start: int, size: int) -> dict[str, Any]:
        if not 0 <= start < self.firsts[-1]:
            raise RowError("bad-row", f"{self.path} has {self.firsts[-1]} rows, row {start} is not among them; run eagle prepare again")
        number = bisect_right(self.firsts, start) - 1
        return self._kept_group(number).slice(start - self.firsts[number], 1).to_pylist()[0]

    def name(self, row: int, start: int) -> str:
        return f"{Path(self.path).name}, row {row}"

    def _kept_group(self, number: int) -> pa.Table:
        with self._lock:
            if self._kept is None or self._kept[0] != number:
                try:
                    self._kept = number, self._group(number)
                except (pa.ArrowException, OSError) as error:
                    raise RowError("broken-record", f"{self.path}: row group {number} can't be read: {error}") from error
            return self._kept[1]


class ArrowFile(Columnar):
    """A file in Arrow's stream or file format, mapped into memory."""

    kind = "Arrow"

    def _open(self) -> None:
        source = pa.memory_map(self.path)
        try:
            self._table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            self._table = pa.ipc.open_file(source).read_all()
        self.group_rows = [self._table.num_rows] if self._table.num_rows else []
        self.schema = self._table.schema

    def _group(self, number: int) -> pa.Table:
        return self._table

    def _said(self, number: int) -> pa.Table:
        columns = {field.name: self._table.column(field.name) for field in self.schema if not _has_binary(field.type)}
        for field in self.schema:  # the path next to the bytes of an image
            if pa.types.is_struct(field.type) and field.name not in columns:
                for place in range(field.type.num_fields):
                    inner = field.type.field(place)
                    if not _has_binary(inner.type):
                        columns[f"{field.name}.{inner.name}"] = pc.struct_field(self._table.column(field.name), inner.name)  # pyright: ignore[reportAttributeAccessIssue]
        return pa.table(columns)

    def _media_sizes(self, number: int) -> bytes:
        return str(sum(self._table.column(field.name).nbytes for field in self.schema if _has_binary(field.type))).encode()


def _python_rows(table: pa.Table, rows: int) -> Iterator[dict[str, Any]]:
    if not table.num_columns:
        yield from ({} for _ in range(rows))
        return
    for first in range(0, table.num_rows, _AT_ONCE):
        yield from table.slice(first, _AT_ONCE).to_pylist()


def _has_binary(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return any(_has_binary(kind.field(place).type) for place in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
