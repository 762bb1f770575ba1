"""Step 3, select: clips that add something to the existing training set, up to a budget of hours per bucket of durations."""

import importlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eagle_train.config import ConfigError
from eagle_train.data.ledger import Entry

from .embed import entries_for, vectors_of
from .folder import Folder, nothing
from .selection import Nearest, Vectors, farthest_first, near_duplicates, nearest, share_hours
from .settings import CurateConfig, SelectConfig


def select(config: CurateConfig, *, progress: Callable[[int, int], None] | None = None) -> pa.Table:
    """Select clips of `embed.parquet`; returns them in the order of selection, with `similarity` (to the nearest seed clip; null: no seed).

    Removed clips are in the ledger: `not-novel`, `near-duplicate`, `over-budget`.
    """
    folder = Folder(config.folder)
    clips = folder.read("embed")
    if not clips.num_rows:
        raise nothing("select", "embed", folder.ledger.path)
    seed, seed_seconds = read_seed(config.select)
    names = clips["clip"].to_pylist()
    vectors = vectors_of(clips)
    seconds = clips["end"].to_numpy() - clips["start"].to_numpy()
    entries: list[Entry] = []

    def remove(rows: np.ndarray, reason: str, details: list[str]) -> None:
        entries.extend(entries_for("select", clips, rows.tolist(), reason, [f"{names[row]}: {text}" for row, text in zip(rows, details)]))

    try:
        found = _search(config.select, config.embed.device or "cpu")(vectors, seed)
    except ValueError as error:
        raise ConfigError(f"select.seed: {error}") from error
    novel = found.similarity < config.select.tau
    old = np.flatnonzero(~novel)
    remove(old, "not-novel", [f"similarity {found.similarity[row]:.4f} to clip {found.which[row] + 1} of the seed" for row in old])
    rows = np.flatnonzero(novel)
    # Long clips first, so that of two similar clips the longer one is kept; equal lengths in the order of the table.
    rows = rows[np.argsort(-seconds[rows], kind="stable")]
    of = near_duplicates(vectors[rows], config.select.duplicate)
    again = np.flatnonzero(of >= 0)
    remove(rows[again], "near-duplicate", [f"similar to {names[rows[of[row]]]}" for row in again])
    rows = np.sort(rows[of < 0])
    chosen = _fill(config.select, vectors, seconds, seed_seconds, rows, found.similarity, progress)
    if progress is not None:
        progress(len(rows), len(rows))  # the budget may be full before
    left = np.setdiff1d(rows, chosen)
    remove(left, "over-budget", [f"{seconds[row]:.1f} s did not fit into the hours of its bucket" for row in left])
    similarity = [float(value) if np.isfinite(value) else None for value in found.similarity[chosen]]
    table = clips.drop_columns(["vector"]).take(chosen).append_column("similarity", pa.array(similarity, pa.float32()))
    return folder.replace("select", table, entries)


def read_seed(settings: SelectConfig) -> tuple[Vectors, np.ndarray]:
    """Vectors float32 [m, d] and lengths in seconds [m] of the existing set. Raises ConfigError for a file that is not embed.parquet."""
    vectors, seconds = [], []
    for path in settings.seed:
        try:
            table = pq.read_table(path, columns=["start", "end", "vector"])
        except FileNotFoundError:
            raise ConfigError(f"select.seed: {path} does not exist") from None
        except (OSError, pa.ArrowException, KeyError) as error:
            problem = str(error).partition(" in ")[0] if isinstance(error, pa.ArrowInvalid) else error  # without the whole schema
            raise ConfigError(f"select.seed: {path} is not an embed.parquet of eagle curate embed ({problem})") from error
        if not table.num_rows:
            raise ConfigError(f"select.seed: {path} has no clips; an empty seed set is written as seed: []")
        try:
            vectors.append(vectors_of(table))
        except ValueError as error:
            raise ConfigError(f"select.seed: {path}: {error}") from error
        seconds.append(table["end"].to_numpy() - table["start"].to_numpy())
    if len({part.shape[1] for part in vectors}) > 1:
        raise ConfigError("select.seed: the files have vectors of different widths; embed all with the same encoder")
    if not vectors:
        return np.empty((0, 0), np.float32), np.empty(0)
    return np.concatenate(vectors), np.concatenate(seconds)


def _search(settings: SelectConfig, device: str) -> Callable[[Vectors, Vectors], Nearest]:
    if settings.index is None:
        return partial(nearest, device=device)
    module, colon, name = settings.index.partition(":")
    try:
        if not colon:
            raise ImportError("expected module:function")
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"select.index: {settings.index} can't be imported: {error}") from error

    def search(queries: Vectors, others: Vectors) -> Nearest:
        if not len(others):
            return nearest(queries, others)
        similarity, which = function(queries, others)
        found = Nearest(np.asarray(similarity, np.float32), np.asarray(which, np.int64))
        if any(part.shape != (len(queries),) for part in found) or not np.isfinite(found.similarity).all():
            shapes = " and ".join(str(part.shape) for part in found)
            raise ConfigError(
                f"select.index: {settings.index} returned {shapes}, expected finite similarities and indices of ({len(queries)},)"
            )
        return found

    return search


def _fill(
    settings: SelectConfig,
    vectors: Vectors,
    seconds: np.ndarray,
    seed_seconds: np.ndarray,
    rows: np.ndarray,
    similarity: np.ndarray,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """Rows in the order of selection, bucket after bucket; without a budget all rows, the most novel first."""
    if settings.hours is None:
        return rows[np.argsort(similarity[rows], kind="stable")]
    bucket = np.digitize(seconds, settings.buckets)
    count = len(settings.buckets) + 1
    available = np.bincount(bucket[rows], seconds[rows], count) / 3600
    if isinstance(settings.hours, list):
        hours = np.minimum(settings.hours, available)
    else:
        seed = np.bincount(np.digitize(seed_seconds, settings.buckets), seed_seconds, count) / 3600
        hours = share_hours(available, seed, settings.hours)
    chosen: list[np.ndarray] = []
    for number in range(count):
        mine = rows[bucket[rows] == number]
        if len(mine) and hours[number] > 0:
            done = sum(map(len, chosen))
            order = None if progress is None else lambda k, done=done: progress(done + k, len(rows))
            picked = farthest_first(vectors[mine], similarity[mine], seconds[mine], hours[number] * 3600, order)
            chosen.append(mine[picked])
    return np.concatenate([np.empty(0, np.int64), *chosen])
