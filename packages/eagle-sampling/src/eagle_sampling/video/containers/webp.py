"""Animated WebP (RFC 9649): sizes and durations from the header of each ANMF chunk. Pillow decodes the pictures."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from ...images import decoding, open_lazily
from ...limits import Limits
from .source import Damaged, Source
from .track import Track, Unsupported

_DEFAULT = 100  # milliseconds in place of a duration of 0, as in browsers


def looks_like_webp(head: bytes) -> bool:
    """`head`: the first bytes of the file."""
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def read_webp(source: Source, limits: Limits) -> Track:
    """The pictures as a video track. Raises Unsupported for a single picture, Damaged for what cannot be read."""
    head = source.read(0, 30)
    if head[12:16] != b"VP8X" or not head[20] & 0x02:
        raise Unsupported("a WebP of one picture")
    durations: list[int] = []
    at, end = 12, 8 + int.from_bytes(head[4:8], "little")
    while at + 8 <= min(end, source.size):
        chunk = source.read(at, 24)
        size = int.from_bytes(chunk[4:8], "little")
        if chunk[:4] == b"ANMF":
            if at + 8 + size > source.size:
                break
            durations.append(int.from_bytes(chunk[20:23], "little") or _DEFAULT)
            limits.check_frames(len(durations), source.path)
        at += 8 + size + (size & 1)
    if not durations:
        raise Damaged("the animated WebP holds no picture")
    ends = np.cumsum(np.array(durations, np.int64))
    return Track(
        container="webp",
        codec="webp",
        width=int.from_bytes(head[24:27], "little") + 1,
        height=int.from_bytes(head[27:30], "little") + 1,
        unit=Fraction(1, 1000),
        ticks=ends - durations,
        sync=np.arange(len(durations)) == 0,
        duration=float(ends[-1]) / 1000,
        missing=int(end > source.size),
    )


def paint_webp(name: str, wanted: set[int], paint: Callable[[av.VideoFrame, int], None], check: Callable[[], None]) -> dict[int, str]:
    """Call `paint(frame, i)` for each wanted picture; transparent parts are white. Returns the reason for each that cannot be decoded."""
    with open_lazily(name, name) as image:
        for number in sorted(wanted):
            check()
            try:
                with decoding("it can't be decoded"):
                    image.seek(number)
                    picture = image.convert("RGBA")
            except ValueError as error:  # later pictures are painted over this one
                return dict.fromkeys((i for i in wanted if i >= number), str(error))
            white = Image.new("RGBA", picture.size, "white")
            paint(av.VideoFrame.from_ndarray(np.asarray(Image.alpha_composite(white, picture).convert("RGB")), "rgb24"), number)
    return {}
