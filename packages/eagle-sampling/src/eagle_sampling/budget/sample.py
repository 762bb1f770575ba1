"""Request and plan of one sample: what its videos want, what it keeps, and why it was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..limits import whole_number

CAPS = (12, 8, 6, 4, 2, 1)
"""Tile caps of Eq. (2), largest first."""
FRAMES_PER_VIDEO = 32
"""Frames of every video under the strategy "uniform" when no other number is given."""
REASONS = ("text_too_long", "images_too_long", "too_few_frames", "too_long")
"""Why a sample is dropped."""


class VideoRequest(NamedTuple):
    """Frames that a video wants, or pages that a document wants.

    `wanted`: frames at 2 per second, or all pages. `minimum`: with fewer the sample is dropped; 1 <= minimum <= wanted
    (default in the paper: min(8, wanted)). `frame_tokens`: cost of one frame, tags and time included.
    """

    wanted: int
    minimum: int
    frame_tokens: int


class VisualPlan(NamedTuple):
    """What a sample keeps.

    `cap`: most tiles of an image; `image_caps`: the same per image (above `cap` only under "ads-fill"); `frames`: frames of each
    video; `tokens`: the whole sample, text included; `degradations`: what was given up, for example "frames 600->212", "tiles 12->6".
    """

    cap: int
    image_caps: tuple[int, ...]
    frames: tuple[int, ...]
    tokens: int
    degradations: tuple[str, ...]


class Dropped(NamedTuple):
    """Why a sample cannot be used at this length: `reason` is one of `REASONS`, `detail` has the numbers."""

    reason: str
    detail: str


def tile_caps(min_tiles: int, max_tiles: int) -> tuple[int, ...]:
    """Caps that a strategy tries for images of `min_tiles` to `max_tiles` tiles, largest first: `max_tiles`, then those of `CAPS` below it.

    Raises:
        ValueError: unless 1 <= min_tiles <= max_tiles.
        TypeError: a number that is not whole.
    """
    min_tiles, max_tiles = whole_number("min_tiles", min_tiles), whole_number("max_tiles", max_tiles)
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles = {min_tiles}, max_tiles = {max_tiles}: need 1 <= min_tiles <= max_tiles")
    return (max_tiles, *(cap for cap in CAPS if min_tiles <= cap < max_tiles))


def degradations(
    costs: Sequence[Sequence[int]],
    wanted: Sequence[int],
    caps: Sequence[int],
    column: int,
    columns: Sequence[int],
    frames: Sequence[int],
) -> tuple[str, ...]:
    """What a plan gave up. A lower cap that costs no image a tile is not listed."""
    lost: list[str] = []
    for i, (want, given) in enumerate(zip(wanted, frames)):
        if given < want:
            lost.append(f"frames {want}->{given}" if len(frames) == 1 else f"video {i + 1} frames {want}->{given}")
    if any(row[c] < row[0] for row, c in zip(costs, columns)):
        raised = sum(c < column for c in columns)
        higher = f" ({raised} of {len(columns)} images higher)" if raised else ""
        lost.append(f"tiles {caps[0]}->{caps[column]}{higher}")
    return tuple(lost)


def dropped(reason: str, text_tokens: int, max_tokens: int, *numbers: int) -> Dropped:
    """The `Dropped` of a reason; `numbers` are those of its sentence."""
    left = f"{max_tokens - text_tokens} of {max_tokens} tokens are left after {text_tokens} of text"
    if reason == "text_too_long":
        return Dropped(reason, f"text alone is {text_tokens} tokens, the budget is {max_tokens}")
    if reason == "images_too_long":
        least, images, cap = numbers
        return Dropped(reason, f"{images} images need {least} tokens at {cap} tiles each, {left}")
    if reason == "too_few_frames":
        least, frames, needed = numbers
        images = f" and the images {least}" if least else ""
        return Dropped(reason, f"the minimum of {frames} frames needs {needed} tokens{images}, {left}")
    (visual,) = numbers
    return Dropped("too_long", f"frames and images need {visual} tokens, {left}")
