"""What needles are put into: clips of the user's videos, or generated ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from eagle_sampling import MediaError, probe, read_frames
from eagle_train.data.media import VIDEO_SUFFIXES, video_files
from eagle_train.errors import WRONG_USE, TrainError

CHUNK = 64
"""Frames that are in memory at once."""


class NeedleError(TrainError, ValueError):
    """A benchmark that cannot be built as requested; says what to change."""

    exit_code = WRONG_USE
    on_every_rank = True


class Host(NamedTuple):
    """A video: its path, the time of its first frame and its duration in seconds. path None: frames are generated."""

    path: Path | None
    start: float = 0.0
    duration: float = float("inf")


GENERATED = Host(None)


def find_hosts(paths: Sequence[Path], shortest: float) -> list[Host]:
    """The videos at `paths` (files, or folders with everything below them) that last `shortest` seconds; without paths the generated one.

    Raises NeedleError for a path that does not exist, a folder without videos, a file that is not one, and when none is long enough.
    """
    if not paths:
        return [GENERATED]
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = video_files(path)
            if not found:
                raise NeedleError(f"--host {path}: the folder has no video files ({', '.join(sorted(VIDEO_SUFFIXES))}); name another one")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise NeedleError(f"--host {path}: there is no such file or folder")
    hosts, longest = [], 0.0
    for path in files:
        try:
            info = probe(path)
        except MediaError as error:
            raise NeedleError(f"--host {path} cannot be read as a video: {error}; name another file") from error
        duration = info.duration or 0.0
        longest = max(longest, duration)
        if duration >= shortest:
            start = float(info.times.times()[0]) if info.times is not None else 0.0
            hosts.append(Host(path, start, duration))
    if not hosts:
        raise NeedleError(
            f"none of the {len(files)} videos in {', '.join(map(str, paths))} lasts {shortest:g} s (the longest: {longest:.1f} s); "
            "name longer videos with --host, or shorter --lengths"
        )
    return hosts


def host_frames(host: Host, count: int, fps: float, side: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` frames, `fps` a second, of a random part of the host: uint8 [side, side, 3] each. Frames are resized to squares."""
    if host.path is None:
        yield from _generated(count, fps, side, rng)
        return
    begin = host.start + float(rng.random()) * (host.duration - count / fps)
    times = begin + np.arange(count) / fps
    for first in range(0, count, CHUNK):
        yield from read_frames(host.path, times[first : first + CHUNK], side).pixels


def _generated(count: int, fps: float, side: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Soft patches of colour that change completely every two seconds."""
    period = max(1, round(2 * fps))
    before = rng.integers(0, 256, (5, 5, 3)).astype(np.float64)
    after = before
    for index in range(count):
        if index % period == 0:
            before, after = after, rng.integers(0, 256, (5, 5, 3)).astype(np.float64)
        share = (index % period) / period
        patches = Image.fromarray(((1 - share) * before + share * after).astype(np.uint8))
        yield np.asarray(patches.resize((side, side), Image.Resampling.BICUBIC))
