"""What a medium is: its reference in the forms that people have, its size, and what planning must know of a video or document.

Facts never depend on a context length, a tile size or a tokenizer.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
from PIL import Image

from eagle_model.errors import ModelError
from eagle_sampling import Limits, MediaError, TimeTable, VideoInfo, clip_range, image_size, open_image, probe
from eagle_sampling.documents import pdf_size
from eagle_sampling.files import is_remote, open_remote
from eagle_sampling.images import describe
from eagle_tiling import load_rgb

#: A path, bytes, a `data:` address or `{"lmdb_file", "lmdb_key"}`; or an image that is decoded already: Pillow, array or tensor.
ImageRef = Any

_OF_FILES = ("start", "end", "start_time", "end_time")
_OF_FRAMES = ("times", "fps")


class ClipError(ModelError):
    """A clip that lies outside its video, or is empty."""


@dataclass(frozen=True, slots=True)
class VideoRef:
    """A video file, or images that are its frames or the pages of a document.

    path: a video file, a PDF or a TIFF. start, end: bounds of the clip in seconds from the file's first frame.
    frames: images in order, instead of a file; pages of a document when neither `times` (seconds of each frame) nor `fps` (rate at which
    the frames were taken) is given.
    on_damage: of a file, what becomes of damaged frames, as in `eagle_sampling.read_frames`.
    """

    path: str | None = None
    start: float | None = None
    end: float | None = None
    frames: Sequence[ImageRef] = ()
    times: Sequence[float] | None = None
    fps: float | None = None
    on_damage: Literal["refuse", "conceal"] = "refuse"

    @property
    def is_paged(self) -> bool:
        """Whether it is a file of pages: a PDF or a TIFF."""
        return self.path is not None and self.path.lower().endswith((".pdf", ".tif", ".tiff"))

    @property
    def is_document(self) -> bool:
        """Whether its images are pages, which have no times."""
        return self.is_paged or (self.path is None and self.times is None and self.fps is None)

    @property
    def timed(self) -> bool:
        """Whether the prompt says the time of each frame."""
        return self.times is not None if self.path is None else not self.is_paged


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What planning must know of a video, clip or document.

    frames: frames of the clip, or pages. seconds: length of the clip; None: pages, or frames that were chosen already, all of which are
    wanted. last_time: largest time that the prompt can print; None: no times. start, end: bounds of the clip in seconds on the file's
    timeline, like `times`; start is None for a whole file whose first frame appears at 0. Times in prompts count from `start`.
    width, height: pixels as displayed. times: times of the file's frames. frame_times, fps: of frames that were chosen already.
    """

    frames: int
    width: int
    height: int
    seconds: float | None = None
    last_time: float | None = None
    start: float | None = None
    end: float | None = None
    times: TimeTable | None = None
    frame_times: Sequence[float] | None = None
    fps: float | None = None


def local_path(address: str) -> str:
    """The path that a `file://` address names (%20 is a space there), or the path itself, or an address that has an opener
    (`eagle_sampling.register_opener`). Raises ValueError for other addresses."""
    if is_remote(address):
        return address
    if address.startswith(("http://", "https://")):
        raise ValueError(f"{address}: media are not fetched from the network; download the file first and give its path")
    return unquote(address.removeprefix("file://")) if address.startswith("file://") else address


def load_image(ref: ImageRef, limits: Limits | None = None) -> Any:
    """An image to cut into tiles: Pillow (RGB, upright), or the array or tensor itself.

    Raises MediaError for what can't be read or shown, ValueError for an address that is not a file or not base64.
    """
    if isinstance(ref, Image.Image):
        return _in_rgb(ref, "the image")
    if hasattr(ref, "dtype"):
        return ref
    if isinstance(ref, str):
        if ref.startswith("data:"):
            try:
                ref = base64.b64decode(ref.partition("base64,")[2], validate=True)
            except binascii.Error as error:
                raise ValueError(f"a data: address of an image is not base64: {error}") from error
        else:
            ref = local_path(ref)
    with open_image(ref, limits=limits or Limits()) as image:
        return _in_rgb(image, describe(ref))


def _in_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return load_rgb(image)
    except ValueError as error:
        raise MediaError(f"{name}: can't be shown in RGB: {error}") from error


def size_of(image: Any) -> tuple[int, int]:
    """(width, height) of what `load_image` returns."""
    if isinstance(image, Image.Image):
        return image.size
    shape = tuple(image.shape)
    if len(shape) == 3 and shape[0] in (1, 3, 4) and not isinstance(image, np.ndarray):
        return shape[2], shape[1]
    return shape[1], shape[0]


def measure_image(ref: ImageRef, limits: Limits | None = None) -> tuple[int, int]:
    """(width, height) in pixels as displayed, from the header alone where there is one; raises MediaError."""
    if isinstance(ref, Image.Image) or hasattr(ref, "dtype"):
        return size_of(load_image(ref))
    if isinstance(ref, str):
        if ref.startswith("data:"):
            return size_of(load_image(ref, limits))
        ref = local_path(ref)
    width, height = image_size(ref)
    (limits or Limits()).check_size(width, height, describe(ref))
    return width, height


def as_video(ref: Any) -> VideoRef:
    """A video from the forms that people have.

    ref: a VideoRef; the path of a file; frames that are decoded already (a list of images or an array [n, h, w, 3]); or a mapping with
    either as `video` (also `path`, `frames`): for a file with `start`/`start_time` and `end`/`end_time` in seconds, for frames with
    `times` in seconds and `fps`. Raises ValueError for anything else.
    """
    if isinstance(ref, VideoRef):
        return ref
    about = dict(ref) if isinstance(ref, Mapping) else {"video": ref}
    name = next((name for name in ("path", "video", "frames") if about.get(name) is not None), "video")
    video = about.pop(name, None)
    if isinstance(video, Mapping):
        return as_video({**video, **about})
    if isinstance(video, bytes | bytearray) or hasattr(video, "read"):
        raise ValueError("a video or document is given as bytes or an open file; they are read from files: save it and give its path")
    from_file = isinstance(video, str | os.PathLike)
    if not from_file and (not hasattr(video, "__len__") or len(video) == 0):
        got = f"{sorted(about)} without frames" if video is None or hasattr(video, "__len__") else type(video).__name__
        raise ValueError(f"a video must be a path, a mapping with path or frames, or a list of frames; got {got}")
    unread = sorted(key for key in about if about[key] is not None and key not in (_OF_FILES if from_file else _OF_FRAMES))
    if unread:
        kind, names = ("file", _OF_FILES) if from_file else ("list of frames", _OF_FRAMES)
        raise ValueError(f"{', '.join(unread)} can't be given for a video that is a {kind}; what can be given is {', '.join(names)}")
    if not from_file:
        times = about.get("times")
        if times is not None and len(times) != len(video):
            raise ValueError(f"a video has {len(video)} frames but {len(times)} times; give one time for each frame")
        return VideoRef(frames=video, times=times, fps=about.get("fps"))
    start, end = (about.get(key) if about.get(key) is not None else about.get(f"{key}_time") for key in ("start", "end"))
    for key, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value)):
            raise ValueError(f"{key} of a video is {value!r}; it must be a number of seconds")
    return VideoRef(local_path(os.fspath(video)), start, end)


def measure_video(ref: VideoRef, limits: Limits | None = None, *, info: VideoInfo | None = None) -> VideoFacts:
    """Facts of a video, clip or document; `info` is what `eagle_sampling.probe` says of its file, when that is known already.

    Raises MediaError for what can't be read, ClipError for a clip outside of its video, ValueError for a reference to nothing or to both a
    file and frames, or with another number of times than frames.
    """
    limits = limits or Limits()
    if (ref.path is None) == (len(ref.frames) == 0):
        raise ValueError(f"a VideoRef needs a path or frames, one of the two; it has {'neither' if ref.path is None else 'both'}")
    if ref.times is not None and len(ref.times) != len(ref.frames):
        raise ValueError(f"a VideoRef has {len(ref.frames)} frames but {len(ref.times)} times; give one time for each frame")
    if ref.path is None:
        width, height = measure_image(ref.frames[0], limits)
        last = float(max(ref.times)) if ref.times is not None else None
        return VideoFacts(len(ref.frames), width, height, last_time=last, frame_times=ref.times, fps=ref.fps)
    if ref.is_paged:
        limits.check_bytes(_file_size(ref.path), ref.path)
        pages, width, height = pdf_size(ref.path, limits=limits)
        return VideoFacts(pages, width, height)
    info = info or probe(ref.path, limits=limits)
    if info.times is None:
        raise MediaError(f"{ref.path}: the times of its frames can't be known; convert it to MP4 first")
    times = info.times.times()
    origin = float(times[0])  # a transport stream may begin at any time, a cut file at its first frame that can be shown
    try:
        first, stop = clip_range(times - origin, ref.start, ref.end)
    except ValueError as error:
        raise ClipError(f"{ref.path}: {error} (counted from the file's first frame)") from error
    start = origin + (ref.start or 0.0)
    last_end = origin + (info.duration or 0.0)
    begin = float(times[first]) if ref.start is None else start
    finish = last_end if ref.end is None else min(origin + ref.end, last_end)
    return VideoFacts(
        frames=stop - first,
        width=info.width,
        height=info.height,
        seconds=max(finish - begin, 0.0),
        last_time=max(float(times[stop - 1]) - start, 0.0),
        start=ref.start if origin == 0 else start,
        end=None if ref.end is None else origin + ref.end,
        times=info.times,
    )


def _file_size(path: str) -> int:
    if (remote := open_remote(path)) is not None:
        remote.close()
        return remote.size
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise MediaError(f"{path}: can't be read ({error.strerror or error})") from error
