"""Media without a prompt: the parts of the processor that generic programs call for images or videos alone (TRL, vLLM).

A budget of tokens belongs to a prompt, so every medium gets all that it wants here; `EagleProcessor` plans whole requests.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature

from eagle_model.arguments import CALL_SETTINGS, OF_IMAGES, OF_VIDEOS, changed, own_settings
from eagle_model.prompt.costs import FrameCosts
from eagle_model.visual import VideoFacts, VisualSpec, as_video, load_image, measure_video, plan_sample, read_image, read_video, size_of
from eagle_tiling import select_grid, tile_count

#: Without a budget no cost decides anything.
_FREE = FrameCosts(((0,) * 8,) * 8)


class ImagePart:
    """Images to tiles. `spec`: how; a call may change `CALL_SETTINGS` for itself."""

    model_input_names = ("pixel_values",)

    def __init__(self, spec: VisualSpec) -> None:
        self.spec = spec

    def __call__(self, images: Any, *, return_tensors: str | None = None, crop_to_patches: bool = True, **settings: Any) -> BatchFeature:
        """pixel_values uint8 [N, s, s, 3], and num_patches int64 [M]: tiles of each of the M images, thumbnails counted.

        images: one, a list, or a list of lists (whose order is kept), as `eagle_model.visual.load_image` takes them. crop_to_patches:
        False gives each image one tile. Raises MediaError, TypeError for an unknown setting, and ValueError.
        """
        spec = changed(self.spec, settings if crop_to_patches else settings | {"min_tiles": 1, "max_tiles": 1})
        opened = [own_settings(image, OF_IMAGES, "image") for image in _flat(images)]
        pictures = [load_image(image) for image, _ in opened]
        limits = [own.get("max_tiles", spec.max_tiles) for _, own in opened]
        sizes = [size_of(picture) for picture in pictures]
        grids = plan_sample(0, sizes, (), spec, _FREE, image_limits=limits).grids
        counts = [tile_count(grid, thumbnail=spec.thumbnail) for grid in grids]
        tiles = np.empty((sum(counts), spec.tile_size, spec.tile_size, 3), np.uint8)
        start = 0
        for picture, size, grid, count in zip(pictures, sizes, grids, counts):
            read_image(tiles[start : start + count], picture, grid, size, spec)
            start += count
        return BatchFeature({"pixel_values": tiles, "num_patches": np.array(counts, np.int64)}, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None) -> int:
        """Tiles of an image of this size in pixels, thumbnail counted. images_kwargs: `CALL_SETTINGS`; other names are not read."""
        spec = changed(self.spec, {name: value for name, value in (images_kwargs or {}).items() if name in CALL_SETTINGS})
        grid = select_grid(int(width), int(height), min_tiles=spec.min_tiles, max_tiles=spec.max_tiles, tile_size=spec.tile_size)
        return tile_count(grid, thumbnail=spec.thumbnail)


class VideoPart:
    """Videos and documents to tiles, one for each frame or page. `spec`: how; a call may change `CALL_SETTINGS` for itself."""

    model_input_names = ("pixel_values",)

    def __init__(self, spec: VisualSpec) -> None:
        self.spec = spec

    def __call__(self, videos: Any, *, return_tensors: str | None = None, **settings: Any) -> BatchFeature:
        """pixel_values uint8 [N, s, s, 3], and num_frames int64 [V]: frames or pages of each video or document.

        videos: one, or a list, as `eagle_model.visual.as_video` takes them; a list of paths is several videos.
        Raises MediaError, TypeError for an unknown setting, and ValueError.
        """
        spec = changed(self.spec, settings)
        given = [own_settings(video, OF_VIDEOS, "video") for video in (videos if _is_list_of_videos(videos) else [videos])]
        refs = [as_video(video) for video, _ in given]
        facts: list[VideoFacts] = [measure_video(ref) for ref in refs]
        plans = plan_sample(0, (), facts, spec, _FREE, video_specs=[changed(spec, own) for _, own in given]).videos
        counts = [plan.count for plan in plans]
        tiles = np.empty((sum(counts), spec.tile_size, spec.tile_size, 3), np.uint8)
        start = 0
        for ref, plan in zip(refs, plans):
            read_video(tiles[start : start + plan.count], ref, plan)
            start += plan.count
        return BatchFeature({"pixel_values": tiles, "num_frames": np.array(counts, np.int64)}, tensor_type=return_tensors)


def _is_list_of_videos(videos: Any) -> bool:
    """Whether these are several videos: a list of paths, mappings, or lists or arrays of frames, and not the frames of one."""
    if not isinstance(videos, list | tuple):
        return False
    return all(isinstance(video, str | os.PathLike | Mapping | list | tuple) or getattr(video, "ndim", 0) == 4 for video in videos)


def _flat(images: Any) -> list[Any]:
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        return [images]
    return [image for row in images for image in (row if isinstance(row, list | tuple) else [row]) if image is not None]
