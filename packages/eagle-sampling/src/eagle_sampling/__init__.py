"""Token budgets (Automatic Degradation Sampling), frame selection, and exact reading of videos, images and documents.

Names are imported when first used, so that planning over columns does not load the video libraries.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODULE_OF = {
    name: module
    for module, names in {
        "budget": (
            "CAPS",
            "STRATEGIES",
            "Dropped",
            "PlanColumns",
            "PlanResult",
            "VideoRequest",
            "VisualPlan",
            "plan",
            "plan_many",
            "register_strategy",
            "tile_caps",
        ),
        "documents": (
            "animation_times",
            "page_count",
            "page_sizes",
            "pdf_size",
            "read_pages",
            "render_pages",
            "whole_pages",
        ),
        "choose": (
            "choose_chapters",
            "choose_pages",
            "choose_times",
            "clip_range",
            "wanted_frames",
        ),
        "images": (
            "ImageRef",
            "image_size",
            "open_image",
            "read_bytes",
        ),
        "files": (
            "MediaFile",
            "register_opener",
        ),
        "limits": (
            "DEFAULT_LIMITS",
            "FrameError",
            "Limits",
            "MediaError",
            "MediaUnavailable",
        ),
        "lmdb.build": (
            "build_lmdb",
            "check_lmdb",
        ),
        "time_table": ("TimeTable",),
        "video.read": (
            "Frames",
            "read_frames",
        ),
        "video.probe": (
            "VideoInfo",
            "probe",
        ),
    }.items()
    for name in names
}

__all__ = [
    "CAPS",
    "DEFAULT_LIMITS",
    "STRATEGIES",
    "Dropped",
    "FrameError",
    "Frames",
    "ImageRef",
    "Limits",
    "MediaError",
    "MediaFile",
    "MediaUnavailable",
    "PlanColumns",
    "PlanResult",
    "TimeTable",
    "VideoInfo",
    "VideoRequest",
    "VisualPlan",
    "animation_times",
    "build_lmdb",
    "check_lmdb",
    "choose_chapters",
    "choose_pages",
    "choose_times",
    "clip_range",
    "image_size",
    "open_image",
    "page_count",
    "page_sizes",
    "pdf_size",
    "plan",
    "plan_many",
    "probe",
    "read_bytes",
    "read_frames",
    "read_pages",
    "register_opener",
    "register_strategy",
    "render_pages",
    "tile_caps",
    "wanted_frames",
    "whole_pages",
]

if TYPE_CHECKING:
    from .budget import (
        CAPS,
        STRATEGIES,
        Dropped,
        PlanColumns,
        PlanResult,
        VideoRequest,
        VisualPlan,
        plan,
        plan_many,
        register_strategy,
        tile_caps,
    )
    from .choose import choose_chapters, choose_pages, choose_times, clip_range, wanted_frames
    from .documents import animation_times, page_count, page_sizes, pdf_size, read_pages, render_pages, whole_pages
    from .files import MediaFile, register_opener
    from .images import ImageRef, image_size, open_image, read_bytes
    from .limits import DEFAULT_LIMITS, FrameError, Limits, MediaError, MediaUnavailable
    from .lmdb.build import build_lmdb, check_lmdb
    from .time_table import TimeTable
    from .video.probe import VideoInfo, probe
    from .video.read import Frames, read_frames


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
