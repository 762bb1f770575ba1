"""The page of `eagle curate show`: pictures of the clips that a step kept, its pairs, and what it removed."""

from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from eagle_sampling import MediaError, choose_times, clip_range, probe, read_frames
from eagle_train.config import ConfigError
from eagle_train.curate.check import mixture
from eagle_train.curate.folder import CurateError, Folder, where
from eagle_train.curate.settings import STEPS, CurateConfig
from eagle_train.data.ledger import Entry

from .show import picture_of

PICTURES = 4
"""Pictures of one clip."""
HEIGHT = 112
"""Pixels of a picture."""
MOST_ENTRIES = 200
"""Entries of the ledger on a page; their number by reason is always complete."""


def write_page(config: CurateConfig, *, step: str | None = None, rows: int = 40, path: Path | None = None) -> Path:
    """Write the page of a step (default: the last one that is done); returns its path.

    Raises ConfigError for a step that does not exist, CurateError for one that is not done.
    """
    folder = Folder(config.folder)
    if step is not None and step not in STEPS:
        raise ConfigError(f"--step {step}: steps are {', '.join(STEPS)}")
    done = [name for name in STEPS if folder.result(name).exists()]
    if step is None and not done:
        raise CurateError(f"{folder.path} has no results yet; run eagle curate split first")
    step = step or done[-1]
    path = path or folder.path / f"{step}.html"
    path.write_text(page(folder, step, rows), encoding="utf-8")
    return path


def page(folder: Folder, step: str, most: int) -> str:
    """The page as HTML, self-contained; `most` rows, spread evenly over the result."""
    table = folder.read(step)
    chosen = np.unique(np.round(np.linspace(0, table.num_rows - 1, min(most, table.num_rows))).astype(int)) if table.num_rows else []
    columns = [name for name in table.column_names if name != "vector"]
    rows = table.select(columns).take(chosen).to_pylist() if len(chosen) else []
    for row in rows:
        row["pictures"], row["problem"] = pictures(row)
    entries = [entry for entry in folder.ledger if entry.where == where(step)]
    pairs = step in ("annotate", "check")
    return _template().render(
        title=f"{folder.path.name}: {step}",
        total=table.num_rows,
        rows=rows,
        pairs=pairs,
        hours=None if pairs else sum(table["end"].to_numpy() - table["start"].to_numpy()) / 3600,
        mixture=mixture(table.to_pylist()) if pairs else {},
        reasons=Counter(entry.reason for entry in entries).most_common(),
        entries=_spread(entries),
        removed=len(entries),
    )


def pictures(row: dict[str, Any]) -> tuple[list[tuple[str, str]], str | None]:
    """((time, JPEG as a data: address) of frames between start and end, why there are none)."""
    try:
        info = probe(row["video"])
        if info.times is None:
            return [], "the times of its frames are not known"
        times = info.times.times()
        start, end = times[0] + row["start"], times[0] + row["end"]
        first, stop = clip_range(times, start, end)
        wanted = choose_times(times, min(PICTURES, stop - first), start=start, end=end, placement="center")
        width = max(round(HEIGHT * info.width / info.height), 1)
        frames = read_frames(row["video"], wanted, (width, HEIGHT))
    except (MediaError, ValueError) as error:
        return [], str(error)
    return [(f"{time - times[0]:.2f} s", picture_of(pixels, side=width)) for time, pixels in zip(frames.times, frames.pixels)], None


def _spread(entries: list[Entry]) -> list[Entry]:
    if len(entries) <= MOST_ENTRIES:
        return entries
    return [entries[index] for index in np.round(np.linspace(0, len(entries) - 1, MOST_ENTRIES)).astype(int)]


@cache
def _template() -> Any:
    source = (files("eagle_train.watching") / "templates" / "curation.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
