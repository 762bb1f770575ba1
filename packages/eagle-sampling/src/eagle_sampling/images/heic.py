"""HEIC, the photos of phones: HEVC pictures in HEIF, by pillow-heif (the extra `eagle-sampling[heic]`)."""

from __future__ import annotations

import importlib
import io
from functools import cache
from typing import Any

from PIL import Image

from ..limits import Limits, MediaError

_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"))
_INSTALL = "is a HEIC image, whatever its name (photos of phones are); reading it needs pillow-heif: pip install 'eagle-sampling[heic]'"


def is_heic(head: bytes) -> bool:
    """`head`: the first bytes of the file (at least the `ftyp` box)."""
    if head[4:8] != b"ftyp":
        return False
    size = min(int.from_bytes(head[:4], "big"), len(head), 256)
    return bool(_BRANDS & {head[8:12], *(head[at : at + 4] for at in range(16, size, 4))})


def require_heic(name: str) -> Any:
    """The module pillow_heif. Raises MediaError when it is not installed."""
    module = _module()
    if module is None:
        raise MediaError(f"{name}: {_INSTALL}")
    return module


def open_heic(data: bytes, name: str, limits: Limits) -> Image.Image:
    """The decoded primary image, upright. Raises MediaError when it is over the limits; errors of libheif pass through."""
    file = require_heic(name).open_heif(io.BytesIO(data))
    limits.check_size(file.size[0], file.size[1], name)  # pyright: ignore[reportCallIssue]
    image = file.to_pillow()
    image.format = "HEIF"
    return image


@cache
def _module() -> Any:
    try:
        return importlib.import_module("pillow_heif")
    except ImportError:
        return None
