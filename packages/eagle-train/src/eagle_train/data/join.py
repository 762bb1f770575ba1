"""The parts of all sources as one table, which all processes of a host map from one file (Arrow IPC, not compressed)."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eagle_model.prompt.costs import FrameCosts
from eagle_train.config import Config, Source
from eagle_train.executors import in_threads

from .facts import FACTS_VERSION, SCHEMA, Facts, FactsSource, RowFile, root_of
from .keys import RowFormat
from .shared import Damaged, shared

_TOGETHER = 512
"""Parts that are read at once and become one record batch: a million rows with the default data.shard_rows."""


class Part(NamedTuple):
    """A file with the facts of a shard. first_line: of its rows in the source, 1-based. start: of the shard in its annotation file."""

    path: Path
    first_line: int
    start: int


class Prepared(NamedTuple):
    """A source with all its parts. rows: in them; content: a hash of them."""

    name: str
    source: Source
    files: tuple[RowFile, ...]
    form: RowFormat
    fingerprint: str
    rows: int
    bad_rows: int
    content: str
    parts: Sequence[Part]


def join_sources(config: Config, prepared: Sequence[Prepared], costs: FrameCosts | None, key: str) -> Facts:
    """Facts of prepared sources as one table, which is mapped from a file in `joined/` of the facts; it is made when it isn't there."""
    sources, first = [], 0
    for one in prepared:
        entry = one.source
        sources.append(
            FactsSource(
                one.name,
                entry.annotation,
                root_of(entry),
                first,
                one.rows,
                one.bad_rows,
                entry.repeat_time,
                entry.weight,
                entry.max_dynamic_tiles,
                one.files,
                one.form,
                one.fingerprint,
            )
        )
        first += one.rows
    content = _content(prepared)
    parts = [part for one in prepared for part in one.parts]
    path = joined_file(config, prepared)
    table = shared(path, functools.partial(_map, rows=first), functools.partial(_join, parts=parts))
    return Facts(table, tuple(sources), costs or FrameCosts(tuple((0,) * 8 for _ in range(8))), config.prompt.system, key, content)


def joined_file(config: Config, prepared: Sequence[Prepared]) -> Path:
    """Where the table of prepared sources is."""
    return config.facts_folder / "joined" / f"{_content(prepared)}.arrow"


def _content(prepared: Sequence[Prepared]) -> str:
    said = [(one.content, [(part.path.name, part.first_line, part.start) for part in one.parts]) for one in prepared]
    return hashlib.blake2b(repr((FACTS_VERSION, said)).encode(), digest_size=16).hexdigest()


def _map(path: Path, *, rows: int) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise Damaged(str(error)) from error
    if not table.schema.equals(SCHEMA) or len(table) != rows:
        raise Damaged(f"it has {len(table)} rows of {rows}, or other columns")
    return table


def _join(file: BinaryIO, parts: Sequence[Part]) -> None:
    with pa.ipc.new_file(file, SCHEMA) as writer:
        for start in range(0, len(parts), _TOGETHER):
            some = parts[start : start + _TOGETHER]
            for batch in _with_places(in_threads(_read, some), some):
                writer.write_batch(batch)


def _with_places(tables: Sequence[pa.Table], parts: Sequence[Part]) -> Iterator[pa.RecordBatch]:
    """The tables as one batch, with lines of the source and addresses of the file. Several batches where one can't hold all times."""
    rows = [len(table) for table in tables]
    table = pa.concat_tables(tables)
    for name, bases in (("line", [part.first_line for part in parts]), ("offset", [part.start for part in parts])):
        place = SCHEMA.get_field_index(name)
        values = table.column(name).to_numpy() + np.repeat(np.array(bases, np.int64), rows)
        table = table.set_column(place, SCHEMA.field(place), pa.array(values))
    yield from table.combine_chunks().to_batches()


def _read(part: Part) -> pa.Table:
    try:
        with pq.ParquetFile(part.path, memory_map=True) as file:
            return file.read().cast(SCHEMA).replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{part.path}: can't be read ({error}); remove the folder {part.path.parent} and run eagle prepare again") from error
