"""How often every row of a run is trained, as a table: what a mixture, repeat_time and weight come to, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from eagle_train.data.atomic import replacing
from eagle_train.planning.stages import StageSchedule

SCHEMA = pa.schema([("stage", pa.string()), ("source", pa.string()), ("line", pa.int64()), ("times", pa.int64())])
"""line: 1-based, over all files of the source. times: samples of the row in all steps of the stage; 0 for a row that is not drawn."""


def write_draws(schedules: Sequence[StageSchedule], path: Path) -> int:
    """Write a line for every stage and usable row, as CSV (`.csv`) or Parquet; returns how many. Plans every epoch of every stage."""
    parts = [SCHEMA.empty_table()]
    for schedule in schedules:
        facts, times = schedule.facts, schedule.times_drawn()
        sources = np.repeat([source.name for source in facts.sources], [source.rows for source in facts.sources])
        columns = [pa.array([schedule.stage.name]).take(pa.array(np.zeros(len(facts), np.int64))), sources, facts.column("line"), times]
        parts.append(pa.table(columns, schema=SCHEMA))
    table = pa.concat_tables(parts).combine_chunks()  # pyarrow 18 writes the header again after an empty part
    with replacing(path) as file:
        if path.suffix == ".csv":
            pyarrow.csv.write_csv(table, file)
        else:
            pq.write_table(table, file, compression="zstd")
    return table.num_rows
