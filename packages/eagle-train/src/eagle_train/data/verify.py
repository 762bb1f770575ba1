"""Whether an image file is whole, for less than decoding it: sizes come from headers, and a file cut in half still has its header.

JPEG, PNG, GIF, WebP and BMP say where they end. A file that does not end as its format says (a cut one, or a whole one with bytes
behind it) is decoded, and that decides; so is every format that does not say.
"""

import os
from typing import Any

from eagle_sampling import Limits, open_image, read_bytes
from eagle_sampling.files import MediaStream, open_remote

_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_TAIL = 32


def check_image(ref: Any, level: str, limits: Limits) -> None:
    """Raise MediaError when the image is damaged as far as `level` (header, ends, decode) looks, or its file is over the limits."""
    if level == "decode":
        open_image(ref, limits=limits)
        return
    if isinstance(ref, str) and (remote := open_remote(ref)) is not None:
        with MediaStream(remote, ref):
            size = remote.size
            limits.check_bytes(size, ref)
            if level == "header":
                return
            head, tail = remote.read(0, _TAIL), remote.read(max(0, size - _TAIL), _TAIL)
    elif isinstance(ref, str):
        size = os.stat(ref).st_size
        limits.check_bytes(size, ref)
        if level == "header":
            return
        with open(ref, "rb", buffering=0) as file:
            head = file.read(_TAIL)
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
    else:
        data = read_bytes(ref, limits=limits)
        size, head, tail = len(data), data[:_TAIL], data[-_TAIL:]
    if level == "ends" and not _ends_well(head, tail, size):
        open_image(ref, limits=limits)


def _ends_well(head: bytes, tail: bytes, size: int) -> bool:
    if head.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in tail  # can't occur in coded data, where 0xff is followed by 0
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return tail.endswith(_PNG_END)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return tail.endswith(b";")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") == size
    return False
