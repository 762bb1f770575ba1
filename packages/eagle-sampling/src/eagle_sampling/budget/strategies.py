"""Sampling strategies: functions from columns of requests to caps and frame counts, registered by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .columns import IMAGES_TOO_LONG, OK, TOO_FEW_FRAMES, TOO_LONG, PlanColumns, row_sums
from .share import share_columns


class Options(NamedTuple):
    """Checked options of `plan`. `caps`: falling. `frames_per_video`, `cap`: what a strategy with fixed sizes uses; None: the first cap."""

    caps: tuple[int, ...]
    frames_per_video: int
    cap: int | None

    @property
    def cap_column(self) -> int:
        """Index of `cap` in `caps`."""
        return 0 if self.cap is None else self.caps.index(self.cap)


class Choice(NamedTuple):
    """What a strategy chooses for N rows with M images and V videos.

    `status` int8 [N]: index into `STATUS`. `cap_index` int8 [N], `image_cap_index` int8 [M]: indices into the caps, smaller is larger.
    `frames` int64 [V]. `left` int64 [N]: tokens not used, negative where the status is `TOO_LONG`. Only `status` and `left` of dropped
    rows are read. `status`, `cap_index` and `image_cap_index` are new arrays, which the caller writes to.
    """

    status: NDArray[np.int8]
    cap_index: NDArray[np.int8]
    image_cap_index: NDArray[np.int8]
    frames: NDArray[np.int64]
    left: NDArray[np.int64]


StrategyFunction: TypeAlias = Callable[[PlanColumns, NDArray[np.int64], Options], Choice]
"""(columns, room [N] = tokens left after the text, options) -> Choice. A row with negative room is dropped in any case."""


class Strategy(NamedTuple):
    """A registered strategy. `by_rate`: videos want frames by their length in seconds; False: `frames_per_video`, or all they have."""

    choose: StrategyFunction
    by_rate: bool = True


def ads(columns: PlanColumns, room: NDArray[np.int64], options: Options) -> Choice:
    """Automatic Degradation Sampling, Eq. (2) of Eagle 2.5.

    Phase 1 gives all videos what they want if it fits next to all images at the last cap (the paper's t = 1). Otherwise each video gets
    frames in proportion to what it wants, none below its minimum: with `x` the largest real number for which
    `sum frame_tokens * max(minimum, x * wanted)` fits, each gets the whole part, and the frames that remain are given one at a time by
    falling fraction (then by position) until no video can take one more. With equal frame costs these are exactly the paper's
    `n* = floor(left / frame_tokens)` frames. Phase 2 takes the first of the caps at which all images fit next to the frames.
    """
    image_sums = row_sums(columns.image_tokens, columns.image_offsets)  # [N, C]
    status = np.zeros(len(columns), np.int8)
    room = room - image_sums[:, -1]
    status[room < 0] = IMAGES_TOO_LONG
    needed = row_sums(columns.minimum * columns.frame_tokens, columns.video_offsets)
    status[(status == OK) & (needed > room)] = TOO_FEW_FRAMES
    frames, spent = share_columns(columns, room, status == OK)
    left = room + image_sums[:, -1] - spent
    fits = image_sums <= left[:, None]
    fits[:, -1] = True
    cap_index = fits.argmax(axis=1).astype(np.int8)
    left = left - np.take_along_axis(image_sums, cap_index[:, None].astype(np.intp), axis=1)[:, 0]
    return Choice(status, cap_index, np.repeat(cap_index, np.diff(columns.image_offsets)), frames, left)


def ads_fill(columns: PlanColumns, room: NDArray[np.int64], options: Options) -> Choice:
    """`ads`, then single images get a higher cap: the raise that costs most and still fits, until none fits.

    Of equal raises the first image's, to its largest cap, comes first.
    """
    choice = ads(columns, room, options)
    rows = np.flatnonzero((choice.status == OK) & (choice.cap_index > 0) & (choice.left > 0))
    image_cap_index, left = choice.image_cap_index.copy(), choice.left.copy()
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
    return choice._replace(image_cap_index=image_cap_index, left=left)


def uniform(columns: PlanColumns, room: NDArray[np.int64], options: Options) -> Choice:
    """`frames_per_video` frames of every video (or all that it wants) and every image at `cap`, or the row is dropped."""
    column = options.cap_column
    frames = np.minimum(columns.wanted, options.frames_per_video)
    images = row_sums(columns.image_tokens[:, column], columns.image_offsets)
    left = room - images - row_sums(frames * columns.frame_tokens, columns.video_offsets)
    status = np.where(left < 0, np.int8(TOO_LONG), np.int8(OK))
    return Choice(status, np.full(len(columns), column, np.int8), np.full(len(columns.image_tokens), column, np.int8), frames, left)


STRATEGIES: dict[str, Strategy] = {
    "ads": Strategy(ads),
    "ads-fill": Strategy(ads_fill),
    "uniform": Strategy(uniform, by_rate=False),
}
"""Strategies by name."""


def register_strategy(name: str, choose: StrategyFunction, *, by_rate: bool = True) -> None:
    """Makes `choose` available to `plan` and `plan_many` as `strategy=name`, in this process.

    A strategy that keeps the minimum of frames and the smallest tiles:

    >>> from eagle_sampling import VideoRequest, plan, register_strategy
    >>> from eagle_sampling.budget import STATUS, Choice, row_sums
    >>> def smallest(columns, room, options):
    ...     last = len(options.caps) - 1
    ...     frames = row_sums(columns.minimum * columns.frame_tokens, columns.video_offsets)
    ...     left = room - frames - row_sums(columns.image_tokens[:, last], columns.image_offsets)
    ...     status = np.where(left < 0, np.int8(STATUS.index("too_long")), np.int8(0))
    ...     cap_index, image_cap_index = (np.full(n, last, np.int8) for n in (len(columns), len(columns.image_tokens)))
    ...     return Choice(status, cap_index, image_cap_index, columns.minimum, left)
    >>> register_strategy("smallest", smallest, by_rate=False)
    >>> plan(300, [], [VideoRequest(600, 8, 272)], max_tokens=58_000, strategy="smallest").frames
    (8,)

    Raises:
        ValueError: another function has that name.
    """
    if name in STRATEGIES and STRATEGIES[name].choose is not choose:
        raise ValueError(f"strategy {name!r} is registered already; choose another name")
    STRATEGIES[name] = Strategy(choose, by_rate)


def find_strategy(name: str) -> Strategy:
    """The strategy of that name. Raises ValueError with the names there are."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy {name!r} is unknown: choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
