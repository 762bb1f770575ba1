"""Phase 1 of Eq. (2): how many frames each video gets when a row cannot pay for all that its videos want."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .columns import PlanColumns, row_sums
from .sample import VideoRequest


def share_columns(columns: PlanColumns, room: NDArray[np.int64], ok: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Frames of all videos (rows that are `ok`) within `room` tokens [N] for frames: frames [V] and their cost [N].

    Rows with one video are a division. Rows with several are grouped by how many they have, one small matrix per group.
    """
    offsets, each = columns.video_offsets, columns.frame_tokens
    frames = columns.wanted
    spent = row_sums(columns.wanted * each, offsets)
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


def _share_matrix(
    wanted: NDArray[np.int64], minimum: NDArray[np.int64], each: NDArray[np.int64], room: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`share_frames` for R rows with K videos each, none of which can pay for all: [R, K] and room [R] -> frames [R, K]."""
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


def share_frames(videos: Sequence[VideoRequest], room: int) -> list[int]:
    """The rule of `strategies.ads` in integers of any size; `room` tokens hold the minimum of each video.

    `_share_matrix` uses it for rows whose products do not fit in 63 bits, and tests compare the two.
    """
    if sum(video.wanted * video.frame_tokens for video in videos) <= room:
        return [video.wanted for video in videos]
    # x = above / below. A video whose share is below its minimum is fixed at the minimum; that lowers x for the others, so repeat.
    free = list(range(len(videos)))
    above, below = room, sum(video.wanted * video.frame_tokens for video in videos)
    while low := [i for i in free if above * videos[i].wanted < videos[i].minimum * below]:
        above -= sum(videos[i].minimum * videos[i].frame_tokens for i in low)
        below -= sum(videos[i].wanted * videos[i].frame_tokens for i in low)
        free = [i for i in free if i not in low]
    frames = [video.minimum for video in videos]
    fraction = [-1] * len(videos)  # a video at its minimum has more than its share already: last in turn
    for i in free:
        frames[i], fraction[i] = divmod(above * videos[i].wanted, below)
    room -= sum(n * video.frame_tokens for n, video in zip(frames, videos))
    turn = sorted(range(len(videos)), key=lambda i: (-fraction[i], i))
    gave = True
    while gave:
        gave = False
        for i in turn:
            if frames[i] < videos[i].wanted and videos[i].frame_tokens <= room:
                frames[i] += 1
                room -= videos[i].frame_tokens
                gave = True
    return frames
