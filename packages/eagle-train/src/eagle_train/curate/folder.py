"""The folder of a curation: one Parquet file per step, parts of steps that are under way, and the ledger.

    <folder>/split.parquet, embed.parquet, select.parquet, annotate.parquet, check.parquet
    <folder>/parts/<step>/<aa>/<key>.parquet     what one item (a video) gave, with the ledger entries of the item in its metadata
    <folder>/answers.jsonl                       every answer of the endpoint, by the hash of its request
    <folder>/ledger.jsonl                        every row that was not used, with its reason
    <folder>/recipe.yaml, samples.jsonl          the result

A part is written under another name and renamed, so after a kill it exists whole or not at all. Its key covers everything that it depends
on: what changed gets another key, what did not is found again. A step's Parquet file is written from its parts, when all are there.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_train.data.atomic import replacing
from eagle_train.data.ledger import Entry, Ledger
from eagle_train.errors import BAD_DATA, TrainError

from .settings import STEPS


class CurateError(TrainError):
    """A step that can't be done; the message says what to do first."""

    exit_code = BAD_DATA


class Part(NamedTuple):
    """What one item gave: rows, and entries for the ledger."""

    table: pa.Table
    entries: list[Entry]


class Folder:
    """Paths and tables of one curation."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ledger = Ledger(self.path / "ledger.jsonl")

    def result(self, step: str) -> Path:
        return self.path / f"{step}.parquet"

    def part(self, step: str, key: str) -> Path:
        return self.path / "parts" / step / key[:2] / f"{key}.parquet"

    def read(self, step: str) -> pa.Table:
        """The result of a step. Raises CurateError when there is none: names the verb that makes it."""
        path = self.result(step)
        try:
            return pq.read_table(path)
        except FileNotFoundError:
            raise CurateError(f"{path} does not exist; run eagle curate {step} first") from None
        except (pa.ArrowException, OSError) as error:
            raise CurateError(
                f"{path} is damaged ({error}); delete it and run eagle curate {step} again: parts that are whole are kept"
            ) from error

    def write(self, step: str, table: pa.Table, entries: Iterable[Entry]) -> None:
        """Replace the result of a step and its entries in the ledger; results of later steps, made from the old one, are removed."""
        for later in STEPS[STEPS.index(step) + 1 :]:
            self.result(later).unlink(missing_ok=True)
        (self.path / "recipe.yaml").unlink(missing_ok=True)
        self.ledger.replace(entries, where=where(step))
        with replacing(self.result(step)) as file:
            pq.write_table(table, file, compression="zstd")

    def unchanged(self, step: str, table: pa.Table) -> bool:
        """Whether the result of a step is there and equals `table`."""
        try:
            return pq.read_table(self.result(step)).equals(table)
        except (FileNotFoundError, pa.ArrowException, OSError):
            return False

    def finish(self, step: str, parts: Sequence[Part], schema: pa.Schema, more: Iterable[Entry] = ()) -> pa.Table:
        """Write a step's result from its parts, in their order, unless it is there already."""
        table = pa.concat_tables([schema.empty_table(), *(part.table.cast(schema) for part in parts)]).combine_chunks()
        return self.replace(step, table, [*(entry for part in parts for entry in part.entries), *more])

    def replace(self, step: str, table: pa.Table, entries: Sequence[Entry]) -> pa.Table:
        """Write a step's result, unless it is the one that is there."""
        if not self.unchanged(step, table):
            self.write(step, table, entries)
        else:
            self.ledger.replace(entries, where=where(step))
        return table


def where(step: str) -> str:
    """The name of a step in the ledger."""
    return f"curate {step}"


def entry(step: str, source: str, line: int, reason: str, detail: str) -> Entry:
    """One entry of the ledger. source: the video; line: 1-based, its place in the list of videos, or the row of the table that was read."""
    return Entry(source, line, reason, detail[:2000], where(step))


def key_of(*content: Any) -> str:
    """A hash of values that JSON can hold."""
    return hashlib.blake2b(
        json.dumps(content, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace"), digest_size=16
    ).hexdigest()


def write_part(path: Path, part: Part) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"ledger": json.dumps([asdict(entry) for entry in part.entries], ensure_ascii=False).encode("utf-8", "backslashreplace")}
    with replacing(path) as file:
        pq.write_table(part.table.replace_schema_metadata(metadata), file, compression="zstd")


def read_part(path: Path) -> Part | None:
    """A part that is there and whole, else None."""
    try:
        table = pq.read_table(path)
        entries = [Entry(**values) for values in json.loads((table.schema.metadata or {})[b"ledger"])]
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, KeyError, ValueError):
        path.unlink(missing_ok=True)  # damaged: made again
        return None
    return Part(table.replace_schema_metadata(None), entries)


def digest(path: str) -> str:
    """BLAKE2b of a file's content; raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def nothing(step: str, previous: str, ledger: Path) -> CurateError:
    """A step whose input has no rows."""
    return CurateError(f"eagle curate {step}: {previous}.parquet has no rows; {ledger} says why each one was removed")
