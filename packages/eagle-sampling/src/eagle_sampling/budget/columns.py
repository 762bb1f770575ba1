"""Samples as columns: requests of N rows (`PlanColumns`) and their plans (`PlanResult`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from .sample import CAPS, REASONS, Dropped, VideoRequest, VisualPlan, degradations, dropped

STATUS = ("ok", *REASONS)
"""Names of the values of `PlanResult.status`."""
OK, TEXT_TOO_LONG, IMAGES_TOO_LONG, TOO_FEW_FRAMES, TOO_LONG = range(5)

_MOST_TOKENS = 1 << 62  # sums and differences of this many stay within int64

_INTEGERS = ("text_tokens", "image_offsets", "image_tokens", "video_offsets", "wanted", "minimum", "frame_tokens")


@dataclass(frozen=True, eq=False)
class PlanColumns:
    """N rows as columns. Row i has the images `image_offsets[i]:image_offsets[i + 1]` and the videos `video_offsets[i]:...` likewise.

    `text_tokens` [N]; `image_offsets` [N + 1]; `image_tokens` [M, C], one column per cap; `video_offsets` [N + 1]; `wanted`,
    `minimum`, `frame_tokens` [V] as in `VideoRequest`. Integers of any width; stored as int64.

    Raises:
        ValueError: lengths or offsets that do not agree, negative token counts, a request without 1 <= minimum <= wanted and
            frame_tokens >= 1, or rows of more than 2^62 tokens in all.
    """

    text_tokens: NDArray[np.int64]
    image_offsets: NDArray[np.int64]
    image_tokens: NDArray[np.int64]
    video_offsets: NDArray[np.int64]
    wanted: NDArray[np.int64]
    minimum: NDArray[np.int64]
    frame_tokens: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            column = np.asarray(getattr(self, name))
            if column.size and column.dtype.kind not in "iu":
                raise ValueError(f"{name} is {column.dtype}: need integers")
            if column.ndim != (2 if name == "image_tokens" else 1):
                raise ValueError(f"{name} has shape {column.shape}: need {'[images, caps]' if name == 'image_tokens' else 'one dimension'}")
            object.__setattr__(self, name, column.astype(np.int64, copy=False))
        n, m, v = len(self.text_tokens), len(self.image_tokens), len(self.wanted)
        for name, count in (("image_offsets", m), ("video_offsets", v)):
            offsets = getattr(self, name)
            if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
                raise ValueError(f"{name}: need {n + 1} rising numbers from 0 to {count}")
        if len(self.minimum) != v or len(self.frame_tokens) != v:
            raise ValueError(
                f"wanted, minimum, frame_tokens have {v}, {len(self.minimum)}, {len(self.frame_tokens)} entries: need as many of each"
            )
        if n and self.text_tokens.min() < 0:
            raise ValueError(f"row {int(self.text_tokens.argmin())}: text_tokens = {self.text_tokens.min()}: a length is not negative")
        if m and self.image_tokens.size and self.image_tokens.min() < 0:
            raise ValueError(f"image {int(np.argmax((self.image_tokens < 0).any(axis=1)))} has a negative number of tokens")
        bad = (self.minimum < 1) | (self.minimum > self.wanted) | (self.frame_tokens < 1)
        if bad.any():
            at = int(bad.argmax())
            row = int(np.searchsorted(self.video_offsets, at, side="right")) - 1
            raise ValueError(
                f"row {row}, video {at - self.video_offsets[row]}: wanted = {self.wanted[at]}, minimum = {self.minimum[at]}, "
                f"frame_tokens = {self.frame_tokens[at]}: need 1 <= minimum <= wanted, frame_tokens >= 1"
            )
        self._check_total()

    def _check_total(self) -> None:
        """Raise ValueError unless all tokens that are asked for can be added in int64."""
        tokens = {
            "text_tokens": self.text_tokens.astype(np.float64),
            "image_tokens": self.image_tokens.max(axis=1, initial=0).astype(np.float64),
            "wanted * frame_tokens": self.wanted.astype(np.float64) * self.frame_tokens,
        }
        if sum(float(column.sum()) for column in tokens.values()) > _MOST_TOKENS:
            name = max(tokens, key=lambda name: float(tokens[name].max(initial=0)))
            at = int(tokens[name].argmax())
            raise ValueError(
                f"{name} is {tokens[name][at]:.3g} at index {at}: more than 2^62 = {_MOST_TOKENS:.3g} tokens in all can't be planned; "
                "give the true numbers of frames and tokens"
            )

    def __len__(self) -> int:
        return len(self.text_tokens)

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[int, npt.ArrayLike, Sequence[VideoRequest]]], *, caps: Sequence[int] = CAPS) -> PlanColumns:
        """Columns from (text_tokens, images [M, C], videos) as `plan` takes them."""
        rows = list(rows)
        images = [_image_tokens(row[1], len(caps)) for row in rows]
        requests = [_request(video) for row in rows for video in row[2]]
        videos = np.asarray(requests or np.zeros((0, 3), np.int64))
        return cls(
            text_tokens=np.asarray([row[0] for row in rows]),
            image_offsets=np.cumsum([0, *(len(image) for image in images)]),
            image_tokens=np.concatenate(images) if images else np.zeros((0, len(caps)), np.int64),
            video_offsets=np.cumsum([0, *(len(row[2]) for row in rows)]),
            wanted=videos[:, 0],
            minimum=videos[:, 1],
            frame_tokens=videos[:, 2],
        )


def _request(video: object) -> tuple[object, object, object]:
    try:
        wanted, minimum, frame_tokens = video  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType]
    except (TypeError, ValueError):
        raise ValueError(f"a video is {video!r}: need a VideoRequest(wanted, minimum, frame_tokens)") from None
    return wanted, minimum, frame_tokens


def _image_tokens(images: npt.ArrayLike, caps: int) -> NDArray[np.int64]:
    tokens = np.asarray(images)
    if tokens.size == 0 and len(tokens) == 0:
        return np.zeros((0, caps), np.int64)
    if tokens.ndim != 2:
        raise ValueError(f"images have shape {tokens.shape}: need [images, {caps}]")
    return tokens


@dataclass(frozen=True, eq=False)
class PlanResult:
    """Plans of N rows.

    `status` int8 [N]: index into `STATUS`, 0 = ok. `cap_index` int8 [N] and `image_cap_index` int8 [M]: indices into `caps`, -1 in
    dropped rows. `frames` int64 [V]: 0 in dropped rows. `tokens` int64 [N]: whole length, text included; 0 in dropped rows.
    `left` int64 [N]: tokens of the budget that are not used; negative in a row that is "too_long".
    """

    status: NDArray[np.int8]
    cap_index: NDArray[np.int8]
    frames: NDArray[np.int64]
    tokens: NDArray[np.int64]
    image_cap_index: NDArray[np.int8]
    left: NDArray[np.int64]
    columns: PlanColumns
    caps: tuple[int, ...]
    max_tokens: int

    def row(self, i: int) -> VisualPlan | Dropped:
        """The plan of row `i`, with what it gave up, or why it was dropped. Raises IndexError."""
        if not 0 <= i < len(self.columns):
            raise IndexError(f"row {i} of {len(self.columns)}")
        columns = self.columns
        images = slice(columns.image_offsets[i], columns.image_offsets[i + 1])
        videos = slice(columns.video_offsets[i], columns.video_offsets[i + 1])
        costs, text = columns.image_tokens[images], int(columns.text_tokens[i])
        status = int(self.status[i])
        if status == OK:
            picked, frames, column = self.image_cap_index[images].tolist(), self.frames[videos].tolist(), int(self.cap_index[i])
            given_up = degradations(costs.tolist(), columns.wanted[videos].tolist(), self.caps, column, picked, frames)
            return VisualPlan(self.caps[column], tuple(self.caps[c] for c in picked), tuple(frames), int(self.tokens[i]), given_up)
        numbers: tuple[int, ...] = ()
        least, fewest = int(costs[:, -1].sum()), columns.minimum[videos]
        if status == IMAGES_TOO_LONG:
            numbers = (least, len(costs), self.caps[-1])
        elif status == TOO_FEW_FRAMES:
            numbers = (least, int(fewest.sum()), int((fewest * columns.frame_tokens[videos]).sum()))
        elif status == TOO_LONG:
            numbers = (self.max_tokens - text - int(self.left[i]),)
        return dropped(STATUS[status], text, self.max_tokens, *numbers)


def row_sums(values: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """values [K, ...] -> sums [N, ...] over offsets[i]:offsets[i + 1]; 0 for an empty row."""
    starts, counts = offsets[:-1], np.diff(offsets)
    if len(values) == len(starts) and (counts == 1).all():
        return values
    if values.ndim == 1:
        running = np.concatenate([[0], np.cumsum(values)])
        return running[offsets[1:]] - running[starts]
    sums = np.zeros((len(starts), *values.shape[1:]), np.int64)
    some = counts > 0
    if some.any():
        sums[some] = np.add.reduceat(values, starts[some], axis=0)
    return sums
