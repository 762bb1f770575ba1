"""The budget of `sample.plan` for millions of rows at once: the same rule over columns, the same answers row by row.

Rows with one video or none are pure arithmetic. Rows whose several videos must share are grouped by how many they have and handled as
small matrices, one group after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .answer import (
    CAPS,
    FRAMES_PER_VIDEO,
    REASONS,
    Dropped,
    VideoRequest,
    VisualPlan,
    check_image_tokens,
    check_options,
    degradations,
    dropped,
)
from .sample import share_frames

STATUS = ("ok", *REASONS)
_OK, _TEXT, _IMAGES, _FRAMES, _LONG = range(5)


@dataclass(frozen=True, eq=False)
class PlanColumns:
    """N rows as columns. Row i has the images `image_offsets[i]:image_offsets[i + 1]` and the videos `video_offsets[i]:...` likewise.

    `text_tokens` [N]; `image_offsets` [N + 1]; `image_tokens` [M, C], one column for each cap; `video_offsets` [N + 1]; `wanted`,
    `minimum`, `frame_tokens` [V] as in `VideoRequest`. Integers of any width; kept as int64.

    Raises:
        ValueError: lengths or offsets that don't fit each other, negative lengths, or a request as `plan` refuses it.
    """

    text_tokens: np.ndarray
    image_offsets: np.ndarray
    image_tokens: np.ndarray
    video_offsets: np.ndarray
    wanted: np.ndarray
    minimum: np.ndarray
    frame_tokens: np.ndarray

    def __post_init__(self) -> None:
        for name in ("text_tokens", "image_offsets", "image_tokens", "video_offsets", "wanted", "minimum", "frame_tokens"):
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
            raise ValueError(f"wanted, minimum, frame_tokens have {v}, {len(self.minimum)}, {len(self.frame_tokens)} entries: need as many")
        if n and self.text_tokens.min() < 0:
            raise ValueError(f"row {int(self.text_tokens.argmin())}: text_tokens = {self.text_tokens.min()}: a length can't be negative")
        bad = (self.minimum < 1) | (self.minimum > self.wanted) | (self.frame_tokens < 1)
        if bad.any():
            at = int(bad.argmax())
            row = int(np.searchsorted(self.video_offsets, at, side="right")) - 1
            raise ValueError(
                f"row {row}, video {at - self.video_offsets[row]}: wanted = {self.wanted[at]}, minimum = {self.minimum[at]}, "
                f"frame_tokens = {self.frame_tokens[at]}: need 1 <= minimum <= wanted, frame_tokens >= 1"
            )

    def __len__(self) -> int:
        return len(self.text_tokens)

    @classmethod
    def from_rows(
        cls, rows: Iterable[tuple[int, Sequence[Sequence[int]], Sequence[VideoRequest]]], *, caps: Sequence[int] = CAPS
    ) -> PlanColumns:
        """Columns from (text_tokens, images, videos) as `plan` takes them."""
        rows = list(rows)
        images = [np.asarray(image) for _, row_images, _ in rows for image in row_images]
        videos = np.array([video for _, _, row_videos in rows for video in row_videos], np.int64).reshape(-1, 3)
        return cls(
            text_tokens=np.array([text for text, _, _ in rows], np.int64),
            image_offsets=np.cumsum([0, *(len(row[1]) for row in rows)]),
            image_tokens=np.stack(images) if images else np.zeros((0, len(caps)), np.int64),
            video_offsets=np.cumsum([0, *(len(row[2]) for row in rows)]),
            wanted=videos[:, 0],
            minimum=videos[:, 1],
            frame_tokens=videos[:, 2],
        )


@dataclass(frozen=True, eq=False)
class PlanResult:
    """Plans of N rows.

    `status` int8 [N]: place in `STATUS`, 0 = ok. `cap_index` int8 [N] and `image_cap_index` int8 [M]: places in `caps`, -1 in rows
    that were dropped. `frames` int64 [V]: 0 in rows that were dropped. `tokens` int64 [N]: whole length, text included; 0 if dropped.
    """

    status: np.ndarray
    cap_index: np.ndarray
    frames: np.ndarray
    tokens: np.ndarray
    image_cap_index: np.ndarray
    columns: PlanColumns
    caps: tuple[int, ...]
    max_tokens: int
    uniform: tuple[int, int] | None  # frames per video and column of the cap

    def row(self, i: int) -> VisualPlan | Dropped:
        """What `plan` says of row `i`, words included."""
        if not 0 <= i < len(self.columns):
            raise IndexError(f"row {i} of {len(self.columns)}")
        columns = self.columns
        images = slice(columns.image_offsets[i], columns.image_offsets[i + 1])
        videos = slice(columns.video_offsets[i], columns.video_offsets[i + 1])
        costs, wanted = columns.image_tokens[images], columns.wanted[videos]
        each, text = columns.frame_tokens[videos], int(columns.text_tokens[i])
        status = int(self.status[i])
        if status == _OK:
            picked, frames, column = self.image_cap_index[images].tolist(), self.frames[videos].tolist(), int(self.cap_index[i])
            given_up = degradations(costs.tolist(), wanted.tolist(), self.caps, column, picked, frames)
            return VisualPlan(self.caps[column], tuple(self.caps[c] for c in picked), tuple(frames), int(self.tokens[i]), given_up)
        numbers: tuple[int, ...] = ()
        least, fewest = int(costs[:, -1].sum()), columns.minimum[videos]
        if status == _IMAGES:
            numbers = (least, len(costs), self.caps[-1])
        elif status == _FRAMES:
            numbers = (least, int(fewest.sum()), int((fewest * each).sum()))
        elif status == _LONG:
            assert self.uniform is not None
            most, column = self.uniform
            numbers = (int(costs[:, column].sum() + (np.minimum(wanted, most) * each).sum()),)
        return dropped(STATUS[status], text, self.max_tokens, *numbers)


def plan_many(
    columns: PlanColumns,
    *,
    max_tokens: int,
    caps: Sequence[int] = CAPS,
    strategy: str = "ads",
    frames_per_video: int = FRAMES_PER_VIDEO,
    cap: int | None = None,
) -> PlanResult:
    """`plan` for every row of `columns`, with the same options and the same answers (`PlanResult.row(i)`). Raises as `plan`."""
    caps = check_options(caps, strategy, frames_per_video, cap)
    check_image_tokens(columns.image_tokens, caps)
    image_sums = _row_sums(columns.image_tokens, columns.image_offsets)  # [N, C]
    room = max_tokens - columns.text_tokens
    status = np.zeros(len(columns), np.int8)
    status[room < 0] = _TEXT
    if strategy == "uniform":
        column = caps.index(cap) if cap is not None else 0
        frames = np.minimum(columns.wanted, frames_per_video)
        left = room - image_sums[:, column] - _row_sums(frames * columns.frame_tokens, columns.video_offsets)
        status[(status == _OK) & (left < 0)] = _LONG
        cap_index = np.full(len(columns), column, np.int8)
    else:
        room = room - image_sums[:, -1]
        status[(status == _OK) & (room < 0)] = _IMAGES
        needed = _row_sums(columns.minimum * columns.frame_tokens, columns.video_offsets)
        status[(status == _OK) & (needed > room)] = _FRAMES
        frames, spent = _share(columns, room, status == _OK)
        left = room + image_sums[:, -1] - spent
        fits = image_sums <= left[:, None]
        fits[:, -1] = True
        cap_index = fits.argmax(axis=1).astype(np.int8)
        left = left - np.take_along_axis(image_sums, cap_index[:, None].astype(np.intp), axis=1)[:, 0]
    ok = status == _OK
    cap_index[~ok] = -1
    image_cap_index = np.repeat(cap_index, np.diff(columns.image_offsets))
    if strategy == "ads-fill":
        left = _fill(columns, np.flatnonzero(ok & (cap_index > 0) & (left > 0)), image_cap_index, left)
    if not ok.all():
        frames = np.where(np.repeat(ok, np.diff(columns.video_offsets)), frames, 0)
    tokens = np.where(ok, max_tokens - left, 0)
    uniform = (frames_per_video, caps.index(cap) if cap is not None else 0) if strategy == "uniform" else None
    return PlanResult(status, cap_index, frames, tokens, image_cap_index, columns, caps, max_tokens, uniform)


def _row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """values [K, ...] -> sums [N, ...] over offsets[i]:offsets[i + 1], empty rows 0."""
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


def _share(columns: PlanColumns, room: np.ndarray, ok: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phase 1. room [N] tokens for frames -> frames [V] (of rows that are `ok`) and what they cost, [N]."""
    offsets, each = columns.video_offsets, columns.frame_tokens
    frames = columns.wanted
    spent = _row_sums(columns.wanted * each, offsets)
    short = np.flatnonzero(ok & (spent > room))
    if len(short) == 0:
        return frames, spent
    frames, spent = frames.copy(), spent.copy()
    counts = offsets[short + 1] - offsets[short]
    one = short[counts == 1]
    at = offsets[one]
    frames[at] = room[one] // each[at]
    spent[one] = frames[at] * each[at]
    for count in np.unique(counts[counts > 1]).tolist():
        rows = short[counts == count]
        at = offsets[rows][:, None] + np.arange(count)  # [R, count]
        shared = _share_matrix(columns.wanted[at], columns.minimum[at], each[at], room[rows])
        frames[at] = shared
        spent[rows] = (shared * each[at]).sum(axis=1)
    return frames, spent


def _share_matrix(wanted: np.ndarray, minimum: np.ndarray, each: np.ndarray, room: np.ndarray) -> np.ndarray:
    """`sample.share_frames` for R rows of the same number of videos, all short of room: [R, K] and room [R] -> frames [R, K]."""
    # The largest product below is (sum of wanted * each) * minimum, or room * wanted.
    size = (wanted * each).sum(axis=1).astype(np.float64)
    huge = np.maximum(size * minimum.max(axis=1), room.astype(np.float64) * wanted.max(axis=1)) > 2.0**62
    if huge.any():
        frames = np.empty_like(wanted)
        frames[~huge] = _share_matrix(wanted[~huge], minimum[~huge], each[~huge], room[~huge])
        for i in np.flatnonzero(huge).tolist():
            frames[i] = share_frames([VideoRequest(*v) for v in np.stack([wanted[i], minimum[i], each[i]], axis=1).tolist()], int(room[i]))
        return frames
    free = np.ones(wanted.shape, bool)
    while True:
        above = (room - np.where(free, 0, minimum * each).sum(axis=1))[:, None]
        below = np.where(free, wanted * each, 0).sum(axis=1)[:, None]
        low = free & (above * wanted < minimum * below)
        if not low.any():
            break
        free &= ~low
    whole, fraction = np.divmod(above * wanted, below)
    frames = np.where(free, whole, minimum)
    left = room - (frames * each).sum(axis=1)
    turn = np.argsort(np.where(free, -fraction, 1), axis=1, kind="stable")
    active = np.arange(len(room))
    while len(active):
        gave = np.zeros(len(active), bool)
        for k in range(wanted.shape[1]):
            i = turn[active, k]
            takes = (frames[active, i] < wanted[active, i]) & (each[active, i] <= left[active])
            frames[active, i] += takes
            left[active] -= np.where(takes, each[active, i], 0)
            gave |= takes
        active = active[gave]
    return frames


def _fill(columns: PlanColumns, rows: np.ndarray, image_cap_index: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Raises single images of `rows` in `image_cap_index` (in place), dearest raise that fits first; returns what is left, [N]."""
    left = left.copy()
    counts = columns.image_offsets[rows + 1] - columns.image_offsets[rows]
    owner = np.repeat(rows, counts)
    image = np.arange(len(owner)) + np.repeat(columns.image_offsets[rows] - (np.cumsum(counts) - counts), counts)
    cap_places = np.arange(columns.image_tokens.shape[1])
    while len(image):
        costs, at = columns.image_tokens[image], image_cap_index[image].astype(np.intp)
        gains = costs - costs[np.arange(len(image)), at][:, None]
        gains[(gains > left[owner][:, None]) | (cap_places >= at[:, None])] = 0
        column = gains.argmax(axis=1)
        gain = gains[np.arange(len(image)), column]
        starts = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
        most = np.repeat(np.maximum.reduceat(gain, starts), np.diff(np.concatenate([starts, [len(owner)]])))
        going = most > 0
        winners = np.flatnonzero(going & (gain == most))
        winners = winners[np.concatenate([[True], owner[winners][1:] != owner[winners][:-1]])[: len(winners)]]
        image_cap_index[image[winners]] = column[winners]
        left[owner[winners]] -= gain[winners]
        image, owner = image[going], owner[going]
    return left
