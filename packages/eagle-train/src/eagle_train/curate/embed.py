"""Step 2, embed: one vector per clip, the mean of its frames' normalised vectors, normalised. Cached by the content of the video."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eagle_sampling import MediaError, choose_times, clip_range, probe, read_frames, wanted_frames
from eagle_train.data.ledger import Entry
from eagle_train.executors import cpus, map_items

from .encoders import Encoder, fingerprint, load_encoder
from .folder import CurateError, Folder, Part, entry, key_of, nothing, read_part, write_part
from .settings import SET_ONE_WORKER, CurateConfig, EmbedConfig

VERSION = 1
FRAMES_AT_ONCE = 256
"""Frames in memory: 113 MB at 384 x 384 pixels."""


class Work(NamedTuple):
    """The clips of one video. lines: their rows in split.parquet, 1-based; workers: decoders in parallel."""

    name: str
    part: Path
    lines: list[int]
    bounds: list[tuple[float, float]]
    settings: EmbedConfig
    device: str
    workers: int


def embed(config: CurateConfig, *, progress: Callable[[int, int], None] | None = None) -> pa.Table:
    """Embed all clips of `split.parquet`; returns them with `frames` (how many were encoded) and `vector` (float32 [d])."""
    folder = Folder(config.folder)
    clips = folder.read("split")
    if not clips.num_rows:
        raise nothing("embed", "split", folder.ledger.path)
    encoder = fingerprint(config.embed.encoder)
    device = config.embed.device or _default_device()
    workers = 1 if device.startswith("cuda") else config.workers or cpus()
    lines: dict[str, list[int]] = {}
    videos, starts, ends = (clips[name].to_pylist() for name in ("video", "start", "end"))
    contents = clips["content"].to_pylist()
    for line, video in enumerate(videos):
        lines.setdefault(video, []).append(line)
    works = []
    for video, rows in lines.items():
        bounds = [(starts[row], ends[row]) for row in rows]
        key = key_of(VERSION, contents[rows[0]], bounds, encoder, config.embed.fps, config.embed.size)
        readers = cpus() if device.startswith("cuda") else 1
        works.append(Work(video, folder.part("embed", key), [row + 1 for row in rows], bounds, config.embed, device, readers))
    todo = [work for work in works if read_part(work.part) is None]
    done = len(works) - len(todo)
    if progress is not None:
        progress(done, len(works))
    processes = config.workers if config.executor == "ray" else workers
    for _ in map_items(run, todo, workers=processes, executor=config.executor, name=lambda work: work.name, advice=SET_ONE_WORKER):
        done += 1
        if progress is not None:
            progress(done, len(works))
    tables, entries = [], []
    for work in works:
        part = read_part(work.part)
        assert part is not None
        kept = part.table["number"].to_pylist()
        rows = clips.take(pa.array([work.lines[number] - 1 for number in kept], pa.int64()))
        for name in ("frames", "vector"):
            rows = rows.append_column(name, part.table[name])
        tables.append(rows)
        entries += [entry("embed", work.name, work.lines[item.line - 1], item.reason, item.detail) for item in part.entries]
    table = pa.concat_tables(tables).combine_chunks()
    return folder.replace("embed", table, entries)


def run(work: Work) -> None:
    """Embed the clips of one video and write its part."""
    encoder = _encoder(work.settings.encoder, work.device)
    write_part(work.part, embed_clips(work.name, work.bounds, encoder, work.settings, workers=work.workers))


def embed_clips(video: str, bounds: list[tuple[float, float]], encoder: Encoder, settings: EmbedConfig, *, workers: int = 1) -> Part:
    """Vectors of clips `(start, end)` in seconds from the first frame: columns `number` (0-based), `frames`, `vector`.

    A clip with a frame that can't be read is left out; entries carry its number + 1 as their line. Raises CurateError for an encoder whose
    vectors are not finite or not of one shape.
    """
    try:
        info = probe(video)
        if info.times is None:
            raise MediaError(f"{video}: the times of its frames are not known")
        times = info.times.times()
    except MediaError as error:
        entries = [entry("embed", video, number + 1, "bad-video", str(error)) for number in range(len(bounds))]
        return Part(_table([], [], []), entries)
    chosen: list[NDArray[np.float64]] = []
    problems: dict[int, str] = {}
    for number, (start, end) in enumerate(bounds):
        try:
            first, stop = clip_range(times, times[0] + start, times[0] + end)
            count = wanted_frames(end - start, settings.fps, available=stop - first)
            chosen.append(choose_times(times, count, start=times[0] + start, end=times[0] + end, placement="center"))
        except ValueError as error:
            problems[number] = str(error)
            chosen.append(np.empty(0))
    owner = np.repeat(np.arange(len(bounds)), [len(part) for part in chosen])
    wanted = np.concatenate([*chosen, np.empty(0)])
    sums: NDArray[np.float64] | None = None
    for first in range(0, len(wanted), FRAMES_AT_ONCE):
        block = slice(first, first + FRAMES_AT_ONCE)
        owners = owner[block]
        try:
            frames = read_frames(video, wanted[block], settings.size or encoder.size, workers=workers, on_error="skip")
        except MediaError as error:
            problems |= {int(number): str(error) for number in np.unique(owners)}
            continue
        for failure in frames.errors:
            problems.setdefault(int(owners[failure.index]), f"the frame at {failure.time:.3f} s can't be read: {failure.reason}")
        owners = np.delete(owners, [failure.index for failure in frames.errors])
        for start in range(0, len(owners), settings.batch):
            vectors = normalised(encoder.encode(frames.pixels[start : start + settings.batch]), video)
            if sums is None:
                sums = np.zeros((len(bounds), vectors.shape[1]))
            np.add.at(sums, owners[start : start + settings.batch], vectors)
    kept = [number for number in range(len(bounds)) if number not in problems]
    entries = [entry("embed", video, number + 1, "bad-frames", f"{video}: {problems[number]}") for number in sorted(problems)]
    vectors = normalised(sums[kept], video) if sums is not None and kept else []
    return Part(_table(kept, [len(chosen[number]) for number in kept], vectors), entries)


def normalised(vectors: Any, name: str) -> NDArray[np.float64]:
    """Rows divided by their lengths, float64 [n, d]. Raises CurateError for values that are not finite, or a row of zeros."""
    values = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True) if values.ndim == 2 else np.zeros(1)
    if not np.isfinite(values).all() or not (lengths > 0).all():
        raise CurateError(f"{name}: the encoder gave vectors of shape {values.shape} that are zero or not finite; check embed.encoder")
    return values / lengths


def vectors_of(table: pa.Table) -> NDArray[np.float32]:
    """The column `vector` as float32 [n, d]. Raises ValueError for what `embed` does not write: other types, widths, lengths than 1."""
    column = table["vector"].combine_chunks()
    if not len(column):
        return np.empty((0, 0), np.float32)
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"the column vector holds {column.type}, expected lists of numbers")
    widths = np.unique(column.value_lengths().fill_null(-1).to_numpy())
    values = column.flatten()
    if len(widths) != 1 or widths[0] < 1 or values.null_count or not pa.types.is_floating(values.type):
        raise ValueError(f"the column vector holds {column.type} of {', '.join(map(str, widths))} values, expected numbers of one width")
    vectors = values.to_numpy().reshape(len(column), -1).astype(np.float32, copy=False)
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.abs(lengths - 1) < 1e-2).all():
        bad = int(np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))[0])
        raise ValueError(f"the vector of row {bad + 1} has the length {lengths[bad]:.4g}, expected 1: divide vectors by their lengths")
    return vectors


def _table(numbers: list[int], frames: list[int], vectors: Any) -> pa.Table:
    vectors = pa.array([row.astype(np.float32) for row in vectors], pa.list_(pa.float32()))
    return pa.table({"number": pa.array(numbers, pa.int64()), "frames": pa.array(frames, pa.int32()), "vector": vectors})


@lru_cache(maxsize=1)
def _encoder(name: str, device: str) -> Encoder:
    """Once per process."""
    import torch

    if device == "cpu" and cpus() > 1:
        torch.set_num_threads(1)  # processes share the CPUs
    return load_encoder(name, device)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def entries_for(step: str, table: pa.Table, lines: list[int], reason: str, details: list[str]) -> list[Entry]:
    """Entries of rows of a table that a step removes; `lines` are 0-based rows of it."""
    videos = table["video"].to_pylist()
    return [entry(step, videos[line], line + 1, reason, detail) for line, detail in zip(lines, details)]
