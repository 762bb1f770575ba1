"""Images and videos in any form become tiles: which grid, which frames, and the pixels."""

import base64
import binascii
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from eagle_model.prompt import VideoSpan, sampled_fps, shown_times
from eagle_sampling import CAPS, Dropped, VideoRequest, choose_times, clip_range, open_image, plan, probe, read_frames, wanted_frames
from eagle_tiling import Grid, load_rgb, select_grid, tile_count, tile_image

#: What a mapping may say about a video.
_OF_FILES = ("start", "end", "start_time", "end_time")
_OF_FRAMES = ("times", "fps")


@dataclass(frozen=True)
class MediaSettings:
    """How media become tiles. tile_size: pixels a side. tokens_per_tile: `k`. fps: frames a second asked for.

    min_frames: a video is never asked for fewer (if it has them). max_frames: at most so many of one video, None for no limit.
    """

    tile_size: int = 448
    tokens_per_tile: int = 256
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    fps: float = 2.0
    min_frames: int = 8
    max_frames: int | None = None
    placement: str = "linspace"


class BudgetError(ValueError):
    """What was asked doesn't fit the budget of tokens."""


def read_image(ref: Any) -> Any:
    """An image to cut: Pillow (RGB, upright), or an array or tensor as it is.

    ref: a Pillow image, array or tensor, path, bytes, `data:` address, or `{"lmdb_file", "lmdb_key"}`. Raises MediaError or ValueError.
    """
    if isinstance(ref, Image.Image):
        return load_rgb(ref)
    if isinstance(ref, np.ndarray) or hasattr(ref, "dtype"):
        return ref
    if isinstance(ref, str) and ref.startswith("data:"):
        try:
            ref = base64.b64decode(ref.partition("base64,")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"a data: address of an image isn't base64: {error}") from error
    with open_image(_local(ref) if isinstance(ref, str) else ref) as image:
        return load_rgb(image)


def _local(address: str) -> str:
    """The path that a `file://` address names (%20 is a space there), or the path itself; ValueError for other addresses."""
    if address.startswith(("http://", "https://")):
        raise ValueError(f"{address}: media aren't fetched from the network; download the file first and give its path")
    return unquote(address.removeprefix("file://")) if address.startswith("file://") else address


def size_of(image: Any) -> tuple[int, int]:
    """(width, height) of what `read_image` gives."""
    if isinstance(image, Image.Image):
        return image.size
    shape = tuple(image.shape)
    if len(shape) == 3 and shape[0] in (1, 3, 4) and not isinstance(image, np.ndarray):
        return shape[2], shape[1]
    return shape[1], shape[0]


@dataclass(frozen=True)
class Clip:
    """A video before its frames are chosen: how many it has, how many it wants, when the last one may be (None without times).

    take(n): tiles uint8 [n, s, s, 3] of n frames, and what the prompt says about them.
    """

    available: int
    wanted: int
    end: float | None
    take: Callable[[int], tuple[np.ndarray, VideoSpan]]


def open_video(ref: Any, settings: MediaSettings) -> Clip:
    """A video from what people have.

    ref: path of a file; frames already decoded, a list of images or an array [n, h, w, 3]; or a mapping with either as `video` (also
    `path`, `frames`), for a file with `start`/`start_time` and `end`/`end_time` in seconds, for frames with `times` in seconds and `fps`.
    Raises MediaError for unreadable files, ValueError for anything else.
    """
    about = dict(ref) if isinstance(ref, Mapping) else {"video": ref}
    name = next((name for name in ("path", "video", "frames") if about.get(name) is not None), "video")
    video = about.pop(name, None)
    if isinstance(video, Mapping):
        return open_video({**video, **about}, settings)
    from_file = isinstance(video, str | os.PathLike)
    if not from_file and (video is None or len(video) == 0):
        raise ValueError(f"a video must be a path, a mapping with path or frames, or a list of frames; got {sorted(about)} without frames")
    unread = sorted(key for key in about if about[key] is not None and key not in (_OF_FILES if from_file else _OF_FRAMES))
    if unread:
        kind, names = ("file", _OF_FILES) if from_file else ("list of frames", _OF_FRAMES)
        raise ValueError(f"nothing reads {', '.join(unread)} of a video that is a {kind}; what can be said of it is {', '.join(names)}")
    if from_file:
        start, end = (about.get(name) if about.get(name) is not None else about.get(f"{name}_time") for name in ("start", "end"))
        return _file_clip(Path(_local(os.fspath(video))), start, end, settings)
    return _decoded_clip(video, about.get("times"), about.get("fps"), settings)


def _file_clip(path: Path, start: float | None, end: float | None, settings: MediaSettings) -> Clip:
    info = probe(path)
    if info.times is None:
        raise ValueError(f"{path}: the times of its frames can't be known; convert it to MP4 first")
    times = info.times.times()
    first, stop = clip_range(times, start, end)
    last_end = float(times[0]) + (info.duration or 0.0)
    begin = float(times[first]) if start is None else start
    finish = last_end if end is None else min(end, last_end)
    seconds = max(finish - begin, 0.0)

    def take(count: int) -> tuple[np.ndarray, VideoSpan]:
        chosen = choose_times(times, count, start=start, end=end, placement=settings.placement)  # type: ignore[arg-type]
        frames = read_frames(path, chosen, settings.tile_size)
        span = VideoSpan(shown_times(chosen, start).tolist(), sampled_fps(count, seconds), settings.tokens_per_tile)
        return frames.pixels, span

    available = stop - first
    wanted = min(max(wanted_frames(seconds, settings.fps), settings.min_frames), settings.max_frames or available, available)
    return Clip(available, wanted, max(float(times[stop - 1]) - (start or 0.0), 0.0), take)


def _decoded_clip(frames: Sequence[Any], times: Sequence[float] | None, fps: float | None, settings: MediaSettings) -> Clip:
    available = len(frames)
    if times is not None and len(times) != available:
        raise ValueError(f"a video has {available} frames but {len(times)} times")

    def take(count: int) -> tuple[np.ndarray, VideoSpan]:
        chosen = np.round(np.linspace(0, available - 1, count)).astype(int) if count > 1 else np.zeros(count, int)
        one = Grid(1, 1)
        tiles = [np.asarray(tile_image(read_image(frames[index]), one, tile_size=settings.tile_size, thumbnail=False)) for index in chosen]
        shown = None if times is None else [float(times[index]) for index in chosen]
        rate = None if fps is None else fps * count / available
        return np.concatenate(tiles), VideoSpan(shown, rate, settings.tokens_per_tile, None if shown is not None else count)

    wanted = min(available, settings.max_frames or available)
    return Clip(available, wanted, None if times is None else float(max(times)), take)


def fit(
    text_tokens: int,
    sizes: Sequence[tuple[int, int]],
    clips: Sequence[Clip],
    frame_tokens: Callable[[int, float | None, int], int],
    settings: MediaSettings,
    max_tokens: int | None,
) -> tuple[list[Grid], list[int]]:
    """The grid of each image and the number of frames of each video: all that is wanted, or what fits `max_tokens` (Eq. 2).

    Raises BudgetError when it can't fit.
    """

    def grids(cap: int) -> list[Grid]:
        return [
            select_grid(width, height, min_tiles=settings.min_tiles, max_tiles=cap, tile_size=settings.tile_size) for width, height in sizes
        ]

    if max_tokens is None:
        return grids(settings.max_tiles), [clip.wanted for clip in clips]
    caps = (settings.max_tiles, *(cap for cap in CAPS if settings.min_tiles <= cap < settings.max_tiles))
    k = settings.tokens_per_tile
    by_cap = {cap: grids(cap) for cap in caps}
    costs = [[tile_count(by_cap[cap][image], thumbnail=settings.thumbnail) * k for cap in caps] for image in range(len(sizes))]
    requests = [VideoRequest(clip.wanted, min(settings.min_frames, clip.wanted), frame_tokens(clip.wanted, clip.end, k)) for clip in clips]
    answer = plan(text_tokens, np.asarray(costs, np.int64).reshape(len(sizes), len(caps)), requests, max_tokens=max_tokens, caps=caps)
    if isinstance(answer, Dropped):
        raise BudgetError(f"the prompt doesn't fit {max_tokens} tokens ({answer.reason}): {answer.detail}")
    return [by_cap[cap][image] for image, cap in enumerate(answer.image_caps)], list(answer.frames)
