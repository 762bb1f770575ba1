"""Parts: the facts of one shard on disk, whole or not at all, with the ledger of its bad rows next to them.

A part is named by what its rows say. It counts lines and addresses from the start of its shard, so that it stays right when rows are added
before or behind it.
"""

import hashlib
import json
import logging
import traceback
from collections.abc import Container
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_sampling import MediaUnavailable
from eagle_train.config import DataConfig

from . import remote
from .atomic import replacing
from .errors import RowError
from .facts import SCHEMA, content_of
from .ledger import Entry, read_entries, write_entries
from .measure import Measurer
from .sample import RowFormat, normalise
from .sources import Shard, open_rows

logger = logging.getLogger(__name__)

UNEXPECTED = "unexpected"
MEDIA_REASONS = frozenset({"media-missing", "bad-image", "bad-video", "bad-document", "bad-clip", UNEXPECTED})
"""Reasons that can go away though the row stays as it is: the key of the facts doesn't cover the media."""
_LONGEST_DETAIL = 2000
"""Characters of a detail that the ledger keeps: it may quote a row, and rows have up to 64 MiB."""


class Counts(NamedTuple):
    """Lines of a shard or a source by what became of them."""

    good: int
    bad: int
    blank: int


class Work(NamedTuple):
    """One shard of one source, as a worker gets it; `again`: of a part that is there, look again at the rows left out for their media."""

    source: str
    file: str
    root: Path | str
    shard: Shard
    first_line: int
    part: Path
    system: str | None
    form: RowFormat
    max_line_bytes: int
    again: bool = False


class Measuring:
    """`run_shard`, for processes: each makes its measurer once."""

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self._of = (tokenizer, data)

    def __call__(self, work: Work) -> Counts:
        return run_shard(work, self._measurer)

    @cached_property
    def _measurer(self) -> Measurer:
        tokenizer, data = self._of
        remote.enable(data.remote)
        return Measurer(tokenizer, data.limits, data.verify)

    def __getstate__(self) -> dict[str, Any]:
        return {"_of": self._of}


def run_shard(work: Work, measurer: Measurer) -> Counts:
    """Measure the rows of a shard and write its part; returns its counts."""
    if work.again and (there := counts_of(work.part)) is not None:
        return _look_again(work, measurer, there)
    table, bad, blank = _measure_rows(work, measurer)
    return _write(work.part, table, bad, blank)


def _look_again(work: Work, measurer: Measurer, there: Counts) -> Counts:
    """Rows whose media were repaired join the part; all others stay what they are."""
    known = list(read_entries(ledger_of(work.part)))
    again = {entry.line for entry in known if entry.reason in MEDIA_REASONS}
    repaired, still_bad, _ = _measure_rows(work, measurer, again)
    bad = sorted([*(entry for entry in known if entry.line not in again), *still_bad], key=lambda entry: entry.line)
    if bad == known:
        return there
    table = pa.concat_tables([pq.read_table(work.part).cast(SCHEMA), repaired]).sort_by("line")
    # The ledger and the part change together: after a kill between the two there is no part, and the whole shard is measured.
    work.part.unlink()
    return _write(work.part, table, bad, there.blank)


def _measure_rows(work: Work, measurer: Measurer, only: Container[int] | None = None) -> tuple[pa.Table, list[Entry], int]:
    """Facts, bad rows and number of empty lines of a shard, or of `only` some lines of it."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    bad: list[Entry] = []
    blank = 0
    for line, (offset, size, content) in enumerate(open_rows(work.file).read(work.shard, work.max_line_bytes)):
        if only is not None and line not in only:
            continue
        try:
            if isinstance(content, RowError):
                raise content
            if content is None:
                blank += 1
                continue
            number = work.first_line + line
            sample = normalise(content, work.source, root=work.root, line=number, system=work.system, form=work.form)
            facts = measurer.measure(sample)
        except RowError as error:
            bad.append(Entry(work.source, line, error.reason, error.detail[:_LONGEST_DETAIL]))
            continue
        except MediaUnavailable:  # says nothing about the row
            raise
        except Exception as error:  # one odd row among millions: the ledger names it, the limits count it, and the others go on
            bad.append(Entry(work.source, line, UNEXPECTED, _report(error)))
            continue
        facts |= {"line": line, "offset": offset - work.shard.start, "size": size}
        for name in columns:
            columns[name].append(facts[name])
    return pa.table(columns, schema=SCHEMA), bad, blank


def _report(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}"[:_LONGEST_DETAIL] + f" ({Path(place.filename).name}:{place.lineno}); please report this"


def _write(part: Path, table: pa.Table, bad: list[Entry], blank: int) -> Counts:
    counts = Counts(table.num_rows, len(bad), blank)
    part.parent.mkdir(parents=True, exist_ok=True)
    write_entries(ledger_of(part), bad)
    with replacing(part) as file:
        about = {"counts": json.dumps(counts), "content": content_of(table)}
        pq.write_table(table.replace_schema_metadata(about), file, compression="zstd")
    return counts


def content_of_part(part: Path) -> str:
    """The hash of the facts in a part; of one of an earlier version, that of its file. Raises OSError for one that can't be read."""
    try:
        content = (pq.read_schema(part).metadata or {}).get(b"content")
        return content.decode() if content else hashlib.blake2b(part.read_bytes(), digest_size=16).hexdigest()
    except pa.ArrowException as error:
        raise OSError(f"{part}: can't be read ({error}); remove the folder {part.parent} and run eagle prepare again") from error


def counts_of(part: Path) -> Counts | None:
    """Counts of a part that is there and whole, else None."""
    if not part.exists():
        return None
    try:
        return Counts(*json.loads((pq.read_schema(part).metadata or {})[b"counts"]))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        logger.warning("%s is damaged, its rows are measured again: %s", part, error)
        return None


def has_media_reasons(part: Path) -> bool:
    """Whether rows of a shard were not used for what their media were, which may have been repaired since."""
    return any(entry.reason in MEDIA_REASONS for entry in read_entries(ledger_of(part)))


def ledger_of(part: Path) -> Path:
    """The ledger next to a part; its lines count from 0."""
    return part.with_name(part.name.removesuffix(".parquet") + ".ledger.jsonl")
