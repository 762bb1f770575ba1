"""Conversations on their way through the processor: one with the plan of its media, one as arrays, several as a batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eagle_model.prompt import IGNORE_INDEX, Encoded, Segment, VisualTokens, encode
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


def batched(columns: Mapping[str, list[np.ndarray]], padding_side: str, padded: bool, pad: int) -> dict[str, Any]:
    """Rows of each column (`input_ids`, `labels`, ...) as one array [B, L], or, unpadded, as lists; with the attention mask.

    pad: the id in `input_ids` where a row has no token. Raises ValueError for another padding_side than "left" and "right".
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
    columns = {**columns, "attention_mask": [np.ones_like(ids) for ids in columns["input_ids"]]}
    if not padded:
        return {name: [row.tolist() for row in rows] for name, rows in columns.items()}
    fill = {"input_ids": pad, "labels": IGNORE_INDEX}
    length = max(len(row) for row in columns["input_ids"])
    result: dict[str, Any] = {}
    for name, rows in columns.items():
        result[name] = np.full((len(rows), length), fill.get(name, 0), np.int64)
        for place, row in zip(result[name], rows):
            place[length - len(row) if padding_side == "left" else 0 :][: len(row)] = row
    return result
