"""Needles in videos: a benchmark that is built offline, with what must be found, how deep and in how long a video chosen."""

from .build import KINDS, NeedleError, Settings, build

__all__ = ["KINDS", "NeedleError", "Settings", "build"]
