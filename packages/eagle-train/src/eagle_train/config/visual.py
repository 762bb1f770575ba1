"""Sections on the prompt, on frames (ADS), tiles (IAP) and packs."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from eagle_sampling.budget import STRATEGIES

from .section import Section


class PromptConfig(Section):
    system: str | None = Field(
        default=None, description="System message for rows that have none; null: the released processor's 'You are a helpful assistant.'"
    )


class SamplingConfig(Section):
    strategy: str = Field(
        default="ads",
        description="ads: text, then frames, then tiles (Eq. 2); ads-fill: what ADS leaves over goes to single images; "
        "uniform: a fixed number of frames, for comparison; or the name of a strategy registered with eagle_sampling.",
    )
    fps: float = Field(default=2.0, gt=0, description="Frames requested per second of video.")
    min_frames: int = Field(
        default=8,
        ge=1,
        description="N_min: a sample is dropped from the stage when one of its videos would get fewer frames than this and has more.",
    )
    max_frames: int | None = Field(default=None, ge=1, description="Most frames of one video or pages of one document; null: what fits.")
    placement: Literal["linspace", "center"] = Field(
        default="linspace", description="Where the frames lie: first to last frame, or the middle of equal parts."
    )

    @field_validator("strategy")
    @classmethod
    def _registered(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"no strategy is called {value!r}; registered are {', '.join(STRATEGIES)}")
        return value

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.max_frames is not None and self.max_frames < self.min_frames:
            raise ValueError(f"max_frames ({self.max_frames}) is below min_frames ({self.min_frames}); lower min_frames too")
        return self


class TilingConfig(Section):
    min_tiles: int = Field(default=1, ge=1, le=64, description="Fewest tiles of an image (without thumbnail).")
    max_tiles: int = Field(default=12, ge=1, le=64, description="Most tiles of an image (without thumbnail); the cap that ADS starts from.")
    thumbnail: bool = Field(default=True, description="Add the whole image as a last tile when there is more than one.")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.max_tiles < self.min_tiles:
            raise ValueError(f"max_tiles ({self.max_tiles}) is below min_tiles ({self.min_tiles})")
        return self


class PackingConfig(Section):
    share_media: bool = Field(
        default=False,
        description="true: rows of a source with the same media (references, clip bounds and text before them) have them in a pack once: "
        "one video, many questions. Loss and gradients are those of separate samples; frames are those that fit the longest of the rows.",
    )
    reserve: float = Field(
        default=0.0625,
        ge=0,
        lt=1,
        description="With share_media: the part of the context that media leave free for further questions about them. Without it a video "
        "that fills the context with one question would be in a pack per question. 0: frames are those of the longest row alone.",
    )
