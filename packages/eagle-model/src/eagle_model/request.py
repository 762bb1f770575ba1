"""One conversation on its way through the processor: with the plan of its media, and as arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eagle_model.prompt import Encoded, Segment, VisualTokens, encode
from eagle_model.prompt.encode import TextEncoder
from eagle_model.visual import SamplePlan, VideoRef, VisualSpec


class Processed(NamedTuple):
    """One conversation: input_ids, labels int64 [T]; tiles uint8 [N, s, s, 3] in the order of the prompt.

    visual_kinds: int64 [n], for each visual token 1 (of an image) or 2 (of a video or document).
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    visual_kinds: np.ndarray


class RequestPlan(NamedTuple):
    """One conversation with the plan of its media: messages with the system message; opened images; videos; how its prompt reads.

    max_tokens: the budget that it was planned for, None without one.
    """

    messages: Sequence[Mapping[str, Any]]
    images: list[Any]
    videos: list[VideoRef]
    plan: SamplePlan
    spec: VisualSpec
    segments: list[Segment]
    max_tokens: int | None

    def encode(self, encoder: TextEncoder) -> Encoded:
        """input_ids and labels, int64 [T]."""
        return encode(self.segments, encoder)

    def visual_kinds(self) -> np.ndarray:
        """For each visual token 1 (of an image) or 2 (of a video or document), int64 [n]."""
        runs = [segment for segment in self.segments if isinstance(segment, VisualTokens)]
        return np.repeat([1 if run.media == "image" else 2 for run in runs], [run.count for run in runs]).astype(np.int64)
