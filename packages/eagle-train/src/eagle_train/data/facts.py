"""Facts: what prepare measured once per row and no stage changes, as Arrow columns, and the way back from a row to its `Sample`.

Nothing here depends on a context length, a number of tiles or a model's tile side: stages derive their plans from these columns.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eagle_train.config import Config, Source

from .sample import Sample, normalise, read_row

FACTS_VERSION = 2
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
        ("video_end", pa.list_(pa.float64())),  # largest time that the prompt can print; null: a document
        ("video_start", pa.list_(pa.float64())),  # clip as the row asks for it, null where it doesn't
        ("video_stop", pa.list_(pa.float64())),
        ("video_width", pa.list_(pa.int32())),  # pixels as displayed
        ("video_height", pa.list_(pa.int32())),
        ("video_times", pa.list_(pa.list_(pa.int64()))),  # TimeTable.to_list(), empty for a document
    ]
)


class FrameCosts(NamedTuple):
    """Tokens around a frame (tags, number, time) by digits: `table[digits of the count][digits before the point of the time]`, [8, 8].

    Column 0 is for frames without a time (pages). An upper bound for any frame of that class, for the tokenizer of the facts.
    """

    table: tuple[tuple[int, ...], ...]

    def overhead(self, counts: np.ndarray, end_times: np.ndarray) -> np.ndarray:
        """int64 [V]: largest tokens that one frame adds to its tile, of videos with `counts` frames and times up to `end_times` seconds."""
        powers = 10 ** np.arange(1, 7)
        rows = 1 + np.searchsorted(powers, np.maximum(counts, 1), side="right")
        # 9.995 prints as 10.00: times change class half a hundredth early, and a hair before, to stay on the safe side of rounding.
        columns = np.where(np.isnan(end_times), 0, 1 + np.searchsorted(powers - 0.00501, np.nan_to_num(end_times), side="right"))
        return np.asarray(self.table, np.int64)[rows, columns]


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

    def load_sample(self, row: int) -> Sample:
        """Read the row from its annotation file; raises RowError or OSError when the file changed under the facts."""
        source = self.source_of(row)
        line, offset, size = (self.table.column(name)[row].as_py() for name in ("line", "offset", "size"))
        content = read_row(source.annotation, offset, size)
        return normalise(content, source.name, root=source.root, line=line, system=self.system)


def empty_table() -> pa.Table:
    """A table without rows."""
    return SCHEMA.empty_table()


def root_of(source: Source) -> Path:
    """Folder that media paths start from."""
    return source.root if source.root is not None else source.annotation.parent


def assemble(config: Config, recipe_sources: dict[str, Source], folders: dict[str, Path], key: str) -> Facts:
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
