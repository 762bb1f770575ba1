"""Tiles of a planned sample: the one place where pixels are read, straight into the array that the model gets.

Any range of a sample's tiles can be read without the rest: frames and pages outside it are not decoded, images without a tile in it not
opened. So the ranks of a context group each read their own share of a pack. No torch: this runs in the loader's processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from eagle_model.prompt import media_order
from eagle_sampling import Limits, MediaError, open_image, read_frames, render_pages
from eagle_sampling.images import describe
from eagle_tiling import load_rgb, tile_count, tile_image
from eagle_train.data.sample import ImageRef, Sample, VideoRef
from eagle_train.planning.visual import ModelFacts, SamplePlan, VideoPlan

FRAMES_TIMEOUT = 300.0
"""Seconds that the frames of one video may take: the readers' own limit, before the loader stops waiting for the process."""


class MaterialiseError(ValueError):
    """A sample that can't become tokens and tiles: `reason` to count by, `detail` for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def count_tiles(plan: SamplePlan, *, thumbnail: bool) -> int:
    """Tiles of a sample: of its images with thumbnails, and its frames and pages."""
    return sum(tile_count(grid, thumbnail=thumbnail) for grid in plan.grids) + sum(video.count for video in plan.videos)


def read_tiles(sample: Sample, plan: SamplePlan, model: ModelFacts, *, thumbnail: bool, limits: Limits) -> np.ndarray:
    """All tiles of a sample, uint8 [N, s, s, 3], in the order of its prompt; raises as `read_tiles_into`."""
    count = count_tiles(plan, thumbnail=thumbnail)
    tiles = np.empty((count, model.tile_size, model.tile_size, 3), np.uint8)
    read_tiles_into(tiles, sample, plan, 0, thumbnail=thumbnail, limits=limits)
    return tiles


def read_tiles_into(out: np.ndarray, sample: Sample, plan: SamplePlan, first: int, *, thumbnail: bool, limits: Limits) -> None:
    """Fill `out`, uint8 [n, s, s, 3], with the sample's tiles `first` ... `first + n - 1`, in the order of its prompt.

    Raises MediaError for media that can't be read, and MaterialiseError for media that changed since they were prepared.
    """
    if (len(sample.images), len(sample.videos)) != (len(plan.grids), len(plan.videos)):
        raise MaterialiseError("changed", "the row has other media than when it was prepared; run eagle prepare again")
    last, side = first + len(out), out.shape[1]
    start = 0  # of the medium, among the sample's tiles
    for medium in media_order(sample.messages, len(sample.images), len(sample.videos)):
        number = medium.number - 1
        is_image = medium.kind == "image"
        count = tile_count(plan.grids[number], thumbnail=thumbnail) if is_image else plan.videos[number].count
        begin, end = max(first - start, 0), min(last - start, count)  # wanted, among the medium's tiles
        if begin < end:
            part = out[start + begin - first : start + end - first]
            if is_image:
                image = _picture(sample.images[number], limits)
                if image.size != plan.sizes[number]:  # its tiles would be cut from another shape than its grid is for
                    raise MaterialiseError("changed", _other_size(sample.images[number], image.size, plan.sizes[number]))
                if len(part) == count:
                    tile_image(image, plan.grids[number], tile_size=side, thumbnail=thumbnail, out=part)
                else:
                    part[:] = tile_image(image, plan.grids[number], tile_size=side, thumbnail=thumbnail)[begin:end]
            else:
                _read_video(part, sample.videos[number], plan.videos[number], begin, limits)
        start += count


def _picture(ref: ImageRef, limits: Limits) -> Image.Image:
    """An image as displayed, RGB."""
    with open_image(ref, limits=limits) as image:
        try:
            return load_rgb(image)
        except ValueError as error:
            raise MediaError(f"{describe(ref)}: can't be shown in RGB: {error}") from error


def _other_size(ref: ImageRef, found: tuple[int, int], planned: tuple[int, int]) -> str:
    return (
        f"{describe(ref)}: is {found[0]} x {found[1]} as displayed, prepare measured {planned[0]} x {planned[1]}. If the file changed, "
        "remove its source's facts and run eagle prepare again; if it did not, its header contradicts its picture: save it anew"
    )


def _read_video(out: np.ndarray, ref: VideoRef, plan: VideoPlan, first: int, limits: Limits) -> None:
    """Frames or pages `first` ... of a video or document."""
    wanted, side = slice(first, first + len(out)), out.shape[1]
    if plan.times is not None:
        if ref.path is None:
            raise MaterialiseError("changed", "a video became a document since prepare; run eagle prepare again")
        read_frames(ref.path, plan.times[wanted], side, timeout=FRAMES_TIMEOUT, limits=limits, out=out)
        return
    pages: Any = plan.pages
    if ref.path is not None:
        render_pages(ref.path, pages[wanted], side, out)
        return
    for place, number in enumerate(pages[wanted].tolist()):
        if number >= len(ref.pages):
            raise MaterialiseError("changed", f"page {number + 1} of {len(ref.pages)} is gone; run eagle prepare again")
        tile_image(_picture(ref.pages[number], limits), (1, 1), tile_size=side, out=out[place : place + 1])
