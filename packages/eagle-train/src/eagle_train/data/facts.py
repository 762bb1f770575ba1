"""Facts: what prepare measured once per row and no stage changes, as Arrow columns, and the address of every row.

Nothing here depends on a context length, a number of tiles or a model's tile side: stages derive their plans from these columns.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eagle_model.prompt.costs import FrameCosts
from eagle_model.visual import FactColumns, VideoFacts
from eagle_sampling import TimeTable
from eagle_train.config import Config, Source

from .sample import Address

FACTS_VERSION = 3
"""Raised when the columns or what they mean change; part of the content key."""

SCHEMA = pa.schema(
    [
        ("line", pa.int64()),  # 1-based, in the annotation file
        ("offset", pa.int64()),  # where the line starts, bytes
        ("size", pa.int32()),  # bytes of the line
        ("text_tokens", pa.int32()),  # every token that is no image context and no frame (upper bound over rates and times)
        ("label_tokens", pa.int32()),  # tokens with a label
        ("image_width", pa.list_(pa.int32())),  # pixels as displayed, per image
        ("image_height", pa.list_(pa.int32())),
        ("video_frames", pa.list_(pa.int32())),  # frames of the clip, pages of the document
        ("video_seconds", pa.list_(pa.float64())),  # length of the clip; null: a document, which has no times
        ("video_last_time", pa.list_(pa.float64())),  # largest time that the prompt can print; null: a document
        ("video_start", pa.list_(pa.float64())),  # bounds of the clip in seconds as the row says them, null where it doesn't
        ("video_end", pa.list_(pa.float64())),
        ("video_width", pa.list_(pa.int32())),  # pixels as displayed
        ("video_height", pa.list_(pa.int32())),
        ("video_times", pa.list_(pa.list_(pa.int64()))),  # TimeTable.to_list(), empty for a document
    ]
)


class FactsSource(NamedTuple):
    """A source of the run: the recipe's entry, and which rows of the facts are its (`first` ... `first + rows`)."""

    name: str
    annotation: Path
    root: Path
    first: int
    rows: int
    bad_rows: int
    repeat_time: float
    weight: float
    max_dynamic_tiles: int | None


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts of all sources of a run, in the recipe's order; `key` names their content."""

    table: pa.Table
    sources: tuple[FactsSource, ...]
    frame_costs: FrameCosts
    system: str | None
    key: str

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """A flat column as numpy, [rows]."""
        return self.table.column(name).combine_chunks().to_numpy(zero_copy_only=False)

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A list column as (offsets int64 [rows + 1], values); a null number is NaN."""
        column = self.table.column(name)
        array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        values = array.flatten().to_numpy(zero_copy_only=False)
        return offsets - offsets[0], values

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
        line, offset, size = (self.table.column(name)[row].as_py() for name in ("line", "offset", "size"))
        return Address(source.name, line, str(source.annotation), offset, size, str(source.root), self.system)

    def columns(self) -> FactColumns:
        """What `eagle_model.visual.plan_columns` takes; `image_limits` from the sources' max_dynamic_tiles."""
        image_offsets, widths = self.lists("image_width")
        video_offsets, frames = self.lists("video_frames")
        limits = None
        if any(source.max_dynamic_tiles is not None for source in self.sources):
            limits = np.full(len(widths), np.iinfo(np.int64).max, np.int64)
            for source in self.sources:
                if source.max_dynamic_tiles is not None:
                    limits[image_offsets[source.first] : image_offsets[source.first + source.rows]] = source.max_dynamic_tiles
        return FactColumns(
            self.column("text_tokens").astype(np.int64),
            image_offsets,
            widths,
            self.lists("image_height")[1],
            limits,
            video_offsets,
            frames,
            self.lists("video_seconds")[1],
            self.lists("video_last_time")[1],
        )

    def media(self, row: int) -> tuple[list[tuple[int, int]], list[VideoFacts]]:
        """Sizes of the row's images, and facts of its videos and documents."""
        sizes = list(zip(*(self.table.column(name)[row].as_py() for name in ("image_width", "image_height"))))
        counts = self.table.column("video_frames")[row].as_py()
        if not counts:
            return sizes, []
        names = ("width", "height", "seconds", "last_time", "start", "end", "times")
        columns = (self.table.column(f"video_{name}")[row].as_py() for name in names)
        return sizes, [
            VideoFacts(frames, *values, times=TimeTable.from_list(times) if values[2] is not None else None)
            for frames, *values, times in zip(counts, *columns)
        ]


def empty_table() -> pa.Table:
    """A table without rows."""
    return SCHEMA.empty_table()


def root_of(source: Source) -> Path:
    """Folder that media paths start from."""
    return source.root if source.root is not None else source.annotation.parent


def join_sources(config: Config, recipe_sources: dict[str, Source], folders: dict[str, Path], key: str) -> Facts:
    """Facts of prepared sources (folders with part-*.parquet and done.json) as one table."""
    tables, sources, first = [], [], 0
    costs: FrameCosts | None = None
    for name, source in recipe_sources.items():
        done = json.loads((folders[name] / "done.json").read_text(encoding="utf-8"))
        parts = [_read_part(folders[name] / part) for part in done["parts"]]
        table = pa.concat_tables(parts) if parts else empty_table()
        costs = FrameCosts(tuple(tuple(row) for row in done["frame_costs"]))
        tables.append(table)
        sources.append(
            FactsSource(
                name,
                source.annotation,
                root_of(source),
                first,
                table.num_rows,
                done["bad_rows"],
                source.repeat_time,
                source.weight,
                source.max_dynamic_tiles,
            )
        )
        first += table.num_rows
    table = _in_one_piece(pa.concat_tables(tables)) if tables else empty_table()
    return Facts(table, tuple(sources), costs or FrameCosts(tuple((0,) * 8 for _ in range(8))), config.prompt.system, key)


def _read_part(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, memory_map=True).cast(SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{path}: can't be read ({error}); remove the folder {path.parent} and run eagle prepare again") from error


def _in_one_piece(table: pa.Table) -> pa.Table:
    """Columns without chunks, but for the times: 2^31 of them (20 000 hours of video) are more than an offset of a list can count, and
    they are only looked up row by row."""
    times = table.column("video_times")
    return table.drop_columns(["video_times"]).combine_chunks().append_column(SCHEMA.field("video_times"), times)
