"""How media become tiles: one frozen object that training, evaluation, export and serving share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eagle_sampling.budget import STRATEGIES, tile_caps
from eagle_tiling.grid import MOST_TILES

Placement = Literal["linspace", "center"]


@dataclass(frozen=True, slots=True)
class VisualSpec:
    """How images, videos and documents become tiles. It is stored in `processor_config.json` and travels with the checkpoint.

    tile_size: side of a tile in pixels. tokens_per_tile: `k`, visual tokens of one tile.
    min_tiles, max_tiles: bounds of an image's grid, thumbnail not counted (Eq. 1). thumbnail: whether an image of several tiles gets the
    whole image as one more.
    strategy: how a budget is spent (`eagle_sampling.plan`): `ads` (Eq. 2), `ads-fill`, `uniform`, or another
    that is registered.
    fps: frames per second of video that are aimed at. min_frames: a video gets at least so many, if it has them, or its sample is dropped.
    max_frames: at most so many frames of a video or pages of a document; None: no limit. placement: where the frames lie in the clip.
    Raises ValueError for values that contradict each other.
    """

    tile_size: int = 448
    tokens_per_tile: int = 256
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    strategy: str = "ads"
    fps: float = 2.0
    min_frames: int = 8
    max_frames: int | None = None
    placement: Placement = "linspace"

    def __post_init__(self) -> None:
        for name in ("tile_size", "tokens_per_tile", "min_tiles", "max_tiles", "min_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not isinstance(self.fps, int | float) or not 0 < self.fps < float("inf"):
            raise ValueError(f"fps is {self.fps!r}; it must be a positive number of frames per second")
        if self.max_tiles > MOST_TILES:
            raise ValueError(f"max_tiles is {self.max_tiles}; it must be at most {MOST_TILES}")
        if self.max_tiles < self.min_tiles:
            raise ValueError(f"max_tiles ({self.max_tiles}) is below min_tiles ({self.min_tiles})")
        if self.max_frames is not None and self.max_frames < self.min_frames:
            raise ValueError(f"max_frames ({self.max_frames}) is below min_frames ({self.min_frames}); lower min_frames too")
        for name, known in (("strategy", tuple(STRATEGIES)), ("placement", ("linspace", "center"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")

    @property
    def caps(self) -> tuple[int, ...]:
        """The tile caps that ADS tries, largest first: those of the paper below `max_tiles`, and `max_tiles` itself."""
        return tile_caps(self.min_tiles, self.max_tiles)

    def replace(self, **changes: Any) -> VisualSpec:
        """The same with other values. Raises TypeError for a name that is not a field, ValueError as the class does."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Fields and values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisualSpec:
        """The inverse of `to_dict`; other keys are left to the caller."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})
