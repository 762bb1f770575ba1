"""Parts: the facts of one shard on disk, whole or not at all, with the ledger of its bad rows beside them."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .annotation import Shard, read_lines
from .facts import SCHEMA
from .ledger import Entry, write_entries
from .measure import Measurer
from .sample import RowError, normalise, parse_row


class Counts(NamedTuple):
    """Lines of a shard or a source by what became of them."""

    good: int
    bad: int
    blank: int


class Work(NamedTuple):
    """One shard of one source, as a worker gets it."""

    source: str
    annotation: Path
    root: Path
    shard: Shard
    part: Path
    system: str | None
    max_line_bytes: int


def run_shard(work: Work, measurer: Measurer) -> Counts:
    """Measure the rows of a shard and write its part; returns its counts."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    bad: list[Entry] = []
    blank = 0
    for line, offset, content in read_lines(work.annotation, work.shard, work.max_line_bytes):
        try:
            if isinstance(content, RowError):
                raise content
            if not content.strip():
                blank += 1
                continue
            sample = normalise(parse_row(content), work.source, root=work.root, line=line, system=work.system)
            facts = measurer.measure(sample)
        except RowError as error:
            bad.append(Entry(work.source, line, error.reason, error.detail))
            continue
        facts |= {"line": line, "offset": offset, "size": len(content)}
        for name in columns:
            columns[name].append(facts[name])
    counts = Counts(len(columns["line"]), len(bad), blank)
    _write(work.part, columns, bad, counts)
    return counts


def _write(part: Path, columns: dict[str, list[Any]], bad: list[Entry], counts: Counts) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    write_entries(ledger_of(part), bad)
    schema = SCHEMA.with_metadata({"counts": json.dumps(counts)})
    temporary = part.with_name(f"{part.name}.{os.getpid()}.tmp")
    pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")
    os.replace(temporary, part)


def counts_of(part: Path) -> Counts | None:
    """Counts of a part that exists, else None (and what a killed run left of it is removed)."""
    if not part.exists():
        for leftover in part.parent.glob(f"{part.name}.*.tmp"):
            leftover.unlink(missing_ok=True)
        return None
    metadata = pq.read_schema(part).metadata or {}
    return Counts(*json.loads(metadata[b"counts"]))


def ledger_of(part: Path) -> Path:
    """The ledger beside a part."""
    return part.with_name(part.name.removesuffix(".parquet") + ".ledger.jsonl")
