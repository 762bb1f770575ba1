"""Pixels of a planned sample, read straight into the array that the model gets.

Any range of a sample's tiles can be read without the rest: frames and pages outside of it are not decoded, images without a tile in it not
opened. So the ranks of a context parallel group each read their own share of a pack.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eagle_model.errors import ModelError
from eagle_model.prompt.render import media_order
from eagle_model.visual.facts import ImageRef, VideoRef, load_image, size_of
from eagle_model.visual.plan import SamplePlan, VideoPlan
from eagle_model.visual.spec import VisualSpec
from eagle_sampling import Limits, read_frames
from eagle_sampling.documents import render_pages
from eagle_sampling.images import describe
from eagle_tiling import Grid, tile_count, tile_image

logger = logging.getLogger(__name__)

FRAMES_TIMEOUT = 300.0
"""Seconds that the frames of one video may take to read."""


class MediaChanged(ModelError):
    """Media or a row that are not what they were when they were measured."""

    reason = "changed"


class Concealed(NamedTuple):
    """A damaged frame of a video with `on_damage="conceal"`, whose picture is the decoder's. time: seconds on the file's timeline."""

    path: str
    time: float
    reason: str


def describe_concealed(frames: Sequence[Concealed]) -> str:
    """One sentence about at least one frame: how many, where, and the reason of the first."""
    places = ", ".join(f"{frame.path} at {frame.time:.2f} s" for frame in frames[:4]) + (", ..." if len(frames) > 4 else "")
    count = f"{len(frames)} frames are" if len(frames) > 1 else "1 frame is"
    return f"{count} damaged, and the decoder's picture is used: {places} ({frames[0].reason})"


def read_tiles(
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[ImageRef],
    videos: Sequence[VideoRef],
    plan: SamplePlan,
    spec: VisualSpec,
    *,
    limits: Limits | None = None,
) -> np.ndarray:
    """All tiles of a sample, uint8 [N, s, s, 3], in the order of its prompt; raises as `read_tiles_into`. Concealed frames are logged."""
    tiles = np.empty((plan.tile_count(spec), spec.tile_size, spec.tile_size, 3), np.uint8)
    if concealed := read_tiles_into(tiles, messages, images, videos, plan, spec, limits=limits):
        logger.warning("%s", describe_concealed(concealed))
    return tiles


def read_tiles_into(
    out: np.ndarray,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[ImageRef],
    videos: Sequence[VideoRef],
    plan: SamplePlan,
    spec: VisualSpec,
    *,
    first: int = 0,
    limits: Limits | None = None,
) -> list[Concealed]:
    """Fill `out`, uint8 [n, s, s, 3], with the sample's tiles `first` ... `first + n - 1`, in the order of its prompt.

    Returns the frames among them that are damaged and concealed. Raises MediaError for media that can't be read, and MediaChanged for media
    that changed since they were measured.
    """
    if (len(images), len(videos)) != (len(plan.grids), len(plan.videos)):
        raise MediaChanged(
            f"{len(images)} images and {len(videos)} videos are there, the plan is for {len(plan.grids)} and {len(plan.videos)}: "
            "the row changed since it was prepared; run eagle prepare again"
        )
    limits = limits or Limits()
    concealed: list[Concealed] = []
    last = first + len(out)
    start = 0  # of the medium, among the sample's tiles
    for medium in media_order(messages, len(images), len(videos)):
        number = medium.number - 1
        is_image = medium.kind == "image"
        count = tile_count(plan.grids[number], thumbnail=spec.thumbnail) if is_image else plan.videos[number].count
        begin, end = max(first - start, 0), min(last - start, count)  # wanted, among the medium's tiles
        if begin < end:
            part = out[start + begin - first : start + end - first]
            if is_image:
                read_image(part, images[number], plan.grids[number], plan.sizes[number], spec, first=begin, limits=limits)
            else:
                concealed += read_video(part, videos[number], plan.videos[number], first=begin, limits=limits)
        start += count
    return concealed


def read_image(
    out: np.ndarray,
    ref: ImageRef,
    grid: Grid,
    size: tuple[int, int],
    spec: VisualSpec,
    *,
    first: int = 0,
    limits: Limits | None = None,
) -> None:
    """Fill `out`, uint8 [n, s, s, 3], with tiles `first` ... of an image, whose `size` (width, height) must be that of its plan.

    Raises MediaError and MediaChanged.
    """
    image = load_image(ref, limits)
    found = size_of(image)
    if found != size:  # its tiles would be cut from another shape than its grid is for
        name = describe(ref) if isinstance(ref, str | bytes | dict) else "the image"
        raise MediaChanged(
            f"{name}: is {found[0]} x {found[1]} as displayed, prepare measured {size[0]} x {size[1]}. If the file changed, "
            "remove its source's facts and run eagle prepare again; if it did not, its header contradicts its picture: save it again"
        )
    if isinstance(image, np.ndarray) or not hasattr(image, "dtype"):
        if len(out) == tile_count(grid, thumbnail=spec.thumbnail):
            tile_image(image, grid, tile_size=spec.tile_size, thumbnail=spec.thumbnail, out=out)
            return
    tiles = tile_image(image, grid, tile_size=spec.tile_size, thumbnail=spec.thumbnail)[first : first + len(out)]
    out[:] = tiles if isinstance(tiles, np.ndarray) else tiles.cpu().numpy()


def read_video(out: np.ndarray, ref: VideoRef, plan: VideoPlan, *, first: int = 0, limits: Limits | None = None) -> list[Concealed]:
    """Fill `out`, uint8 [n, s, s, 3], with frames or pages `first` ... of a video or document.

    Returns the frames that are damaged and concealed (`ref.on_damage`). Raises MediaError and MediaChanged.
    """
    limits = limits or Limits()
    wanted, side = slice(first, first + len(out)), out.shape[1]
    if plan.times is not None:
        if ref.path is None:
            raise MediaChanged("a video became a list of images since it was measured; run eagle prepare again")
        frames = read_frames(ref.path, plan.times[wanted], side, timeout=FRAMES_TIMEOUT, limits=limits, out=out, on_damage=ref.on_damage)
        return [Concealed(ref.path, error.time, error.reason) for error in frames.concealed]
    assert plan.indices is not None
    indices = plan.indices[wanted]
    if ref.path is not None:
        render_pages(ref.path, indices, side, out)
        return []
    for place, number in enumerate(indices.tolist()):
        if number >= len(ref.frames):
            raise MediaChanged(f"image {number + 1} of {len(ref.frames)} is gone; run eagle prepare again")
        tiles = tile_image(load_image(ref.frames[number], limits), (1, 1), tile_size=side, thumbnail=False)
        out[place : place + 1] = tiles if isinstance(tiles, np.ndarray) else tiles.cpu().numpy()
    return []
