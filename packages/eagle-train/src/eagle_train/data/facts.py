"""Facts: what prepare measured once per row and no stage changes, as Arrow columns, and the address of every row.

Nothing here depends on a context length, a number of tiles or a model's tile side: stages derive their plans from these columns.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from eagle_model.prompt.costs import FrameCosts
from eagle_model.visual import FactColumns, VideoFacts
from eagle_sampling import TimeTable
from eagle_train.config import HubDataset, Source, addresses

from . import remote
from .keys import RowFormat
from .recipe import is_pattern
from .sample import Address
from .sources import open_rows

FACTS_VERSION = 5
"""Raised when the columns or what they mean change; part of the content key."""

SCHEMA = pa.schema(
    [
        ("line", pa.int64()),  # 1-based, over all files of the source; in a part: 0-based, in its shard
        ("offset", pa.int64()),  # address of the row in its file (RawRow.start); in a part: counted from the shard's start
        ("size", pa.int64()),
        ("text_tokens", pa.int32()),  # every token outside of image contexts and frames (upper bound over rates and times)
        ("label_tokens", pa.int32()),  # tokens with a label
        ("media_group", pa.int64()),  # names the media and the prompt through the last one; 0: nothing that rows can share
        ("image_width", pa.list_(pa.int32())),  # pixels as displayed, per image
        ("image_height", pa.list_(pa.int32())),
        ("video_frames", pa.list_(pa.int32())),  # frames of the clip, pages of the document
        ("video_seconds", pa.list_(pa.float64())),  # length of the clip; null: a document, which has no times
        ("video_last_time", pa.list_(pa.float64())),  # largest time that the prompt can print; null: a document
        ("video_start", pa.list_(pa.float64())),  # bounds of the clip in seconds as the row says them, null where it doesn't
        ("video_end", pa.list_(pa.float64())),
        ("video_fps", pa.list_(pa.float64())),  # of a list of frames: rate at which they were taken; else null
        ("video_width", pa.list_(pa.int32())),  # pixels as displayed
        ("video_height", pa.list_(pa.int32())),
        ("video_times", pa.list_(pa.list_(pa.int64()))),  # see times_to_list; empty for a document
    ]
)

_ADDRESS = ["line", "offset", "size"]
_PLANNED = ["text_tokens", "image_width", "image_height", "video_frames", "video_seconds", "video_last_time"]


class RowFile(NamedTuple):
    """An annotation file; its rows are lines `first_line` ... of the source (1-based)."""

    path: str
    first_line: int


class FactsSource(NamedTuple):
    """A source of the run: the recipe's entry, and which rows of the facts are its (`first` ... `first + rows`).

    files: its annotation files in order; none: `annotation` is the only one. form: how its rows are written. fingerprint: of all that its
    rows say.
    """

    name: str
    annotation: Any
    root: Path | str
    first: int
    rows: int
    bad_rows: int
    repeat_time: float
    weight: float
    max_dynamic_tiles: int | None
    files: tuple[RowFile, ...] = ()
    form: RowFormat = RowFormat()
    fingerprint: str = ""

    def file_of(self, line: int) -> RowFile:
        """The file that line `line` of the source is in."""
        if not self.files:
            return RowFile(str(self.annotation), 1)
        return self.files[bisect_right([file.first_line for file in self.files], line) - 1]

    def name_of(self, line: int, offset: int) -> str:
        """What a row is called in messages: the name of its file and its place there."""
        file = self.file_of(line)
        return open_rows(file.path).name(line - file.first_line + 1, offset)


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts of all sources of a run, in the recipe's order. key: names the rows and how they are measured. content: a hash of what was
    measured; empty: not known."""

    table: pa.Table
    sources: tuple[FactsSource, ...]
    frame_costs: FrameCosts
    system: str | None
    key: str
    content: str = ""

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """A flat column as numpy, [rows]."""
        return _whole(self.table.column(name)).to_numpy(zero_copy_only=False)

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A list column as (offsets int64 [rows + 1], values); a null number is NaN."""
        return _lists(_whole(self.table.column(name)))

    def source_of(self, row: int) -> FactsSource:
        """The source that row `row` belongs to."""
        firsts = [source.first for source in self.sources]
        index = int(np.searchsorted(firsts, row, side="right")) - 1
        while self.sources[index].rows == 0:  # empty sources share their `first` with the next one
            index -= 1
        return self.sources[index]

    def address(self, row: int) -> Address:
        """Where row `row` stands."""
        source = self.source_of(row)
        line, offset, size = (self.table.column(name)[row].as_py() for name in _ADDRESS)
        return Address(source.name, line, source.file_of(line).path, offset, size, str(source.root), self.system, source.form)

    def addresses(self, source: FactsSource) -> Iterator[Address]:
        """The addresses of all rows of a source, in order."""
        rows = slice(source.first, source.first + source.rows)
        for line, offset, size in zip(*(self.column(name)[rows].tolist() for name in _ADDRESS)):
            yield Address(source.name, line, source.file_of(line).path, offset, size, str(source.root), self.system, source.form)

    def only_addresses(self) -> Facts:
        """The same rows with nothing but their addresses: little to send to another process."""
        return replace(self, table=self.table.select(_ADDRESS))

    def batches(self, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The columns that plans are made of, for up to `rows` rows at a time, each with its first row; nothing is copied."""
        first = 0
        for batch in self.table.select(_PLANNED).to_batches(max_chunksize=rows):
            yield first, batch
            first += len(batch)

    def columns(self, first: int, batch: pa.RecordBatch) -> FactColumns:
        """What `eagle_model.visual.plan_columns` takes, of the rows of a batch from row `first` on; `image_limits` from the sources'
        max_dynamic_tiles."""
        image_offsets, widths = _lists(batch.column("image_width"))
        video_offsets, frames = _lists(batch.column("video_frames"))
        limits = None
        if any(source.max_dynamic_tiles is not None for source in self.sources):
            limits = np.full(len(widths), np.iinfo(np.int64).max, np.int64)
            for source in self.sources:
                begin, end = (min(max(row - first, 0), len(batch)) for row in (source.first, source.first + source.rows))
                if source.max_dynamic_tiles is not None:
                    limits[image_offsets[begin] : image_offsets[end]] = source.max_dynamic_tiles
        return FactColumns(
            batch.column("text_tokens").to_numpy(zero_copy_only=False).astype(np.int64),
            image_offsets,
            widths,
            _lists(batch.column("image_height"))[1],
            limits,
            video_offsets,
            frames,
            _lists(batch.column("video_seconds"))[1],
            _lists(batch.column("video_last_time"))[1],
        )

    def media(self, row: int) -> tuple[list[tuple[int, int]], list[VideoFacts]]:
        """Sizes of the row's images, and facts of its videos and documents."""
        sizes = list(zip(*(self.table.column(name)[row].as_py() for name in ("image_width", "image_height"))))
        if not self.table.column("video_frames")[row].as_py():
            return sizes, []
        names = ("frames", "width", "height", "seconds", "last_time", "start", "end", "times", "fps")
        columns = (self.table.column(f"video_{name}")[row].as_py() for name in names)
        return sizes, [_video_facts(*values) for values in zip(*columns)]


def _whole(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _lists(array: Any) -> tuple[np.ndarray, np.ndarray]:
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    return offsets - offsets[0], array.flatten().to_numpy(zero_copy_only=False)


def _video_facts(
    frames: int,
    width: int,
    height: int,
    seconds: float | None,
    last_time: float | None,
    start: float | None,
    end: float | None,
    times: list[int],
    fps: float | None,
) -> VideoFacts:
    if seconds is not None:
        return VideoFacts(frames, width, height, seconds, last_time, start, end, TimeTable.from_list(times))
    frame_times = np.array(times, np.int64).view(np.float64).tolist() if times else None
    return VideoFacts(frames, width, height, last_time=last_time, frame_times=frame_times, fps=fps)


def times_to_list(video: VideoFacts) -> list[int]:
    """The column `video_times`: the table of a file's times, the bits of the times of a list of frames, or nothing."""
    if video.times is not None:
        return video.times.to_list()
    return [] if video.frame_times is None else np.asarray(video.frame_times, np.float64).view(np.int64).tolist()


def empty_table() -> pa.Table:
    """A table without rows."""
    return SCHEMA.empty_table()


def content_of(table: pa.Table) -> str:
    """A hash of the values of a table, the same however they are stored."""
    digest = hashlib.blake2b(digest_size=16)
    for name in SCHEMA.names:
        _add_values(_whole(table.column(name)), digest)
    return digest.hexdigest()


def _add_values(array: Any, digest: Any) -> None:
    while pa.types.is_list(array.type):
        digest.update(np.diff(array.offsets.to_numpy(zero_copy_only=False)).astype(np.int64).tobytes())
        array = array.flatten()
    digest.update(array.is_null().to_numpy(zero_copy_only=False).tobytes())
    digest.update(array.fill_null(0).to_numpy(zero_copy_only=False).tobytes())


def root_of(source: Source) -> Path | str:
    """Folder or address that media paths start from: `root`, else that of the annotation (of the first one, and of a pattern what comes
    before it; of a dataset of the hub, its repository)."""
    if source.root is not None:
        return source.root
    first = source.annotation[0] if isinstance(source.annotation, list) else source.annotation
    if isinstance(first, HubDataset):
        return f"hf://datasets/{first.hub}" + (f"@{first.revision}" if first.revision else "")
    if isinstance(first, str):
        if addresses.is_pattern(first):
            return addresses.fixed_part(first)
        return first.rstrip("/") if remote.is_folder(first) else addresses.parent(first)
    if is_pattern(first):
        return Path(*itertools.takewhile(lambda part: not any(character in part for character in "*?["), first.parts))
    return first if first.is_dir() else first.parent
