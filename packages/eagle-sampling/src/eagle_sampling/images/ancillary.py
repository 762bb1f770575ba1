"""Encoded images without the data that pictures do not need: text, colour profiles, previews and comments.

Such data may be larger than Pillow's limits (workflows of image generators, profiles of editors) or broken, while the picture is whole.
Browsers show it.
"""

from __future__ import annotations

import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = frozenset((b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"))  # besides the critical chunks, whose names begin in upper case
_MAX_CHUNKS = 1 << 20
_MAX_EXIF = 1 << 20


def without_ancillary(data: bytes) -> bytes | None:
    """The PNG or JPEG with the same picture and orientation and nothing else; None for other formats and files without a picture.

    Nothing is decompressed. Chunks that remain keep their bytes, so that damage of the picture is still found.
    """
    if data[:8] == _PNG:
        return _png(data)
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    return None


def _png(data: bytes) -> bytes | None:
    parts, at = [_PNG], 8
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            break
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind[:1].isupper() or (kind in _PNG_NEEDED and not _is_broken_exif(kind, data[at:end])):
            parts.append(data[at:end])
        at = end
        if kind == b"IEND":
            break
    return b"".join(parts)


def _is_broken_exif(kind: bytes, chunk: bytes) -> bool:
    return kind == b"eXIf" and (len(chunk) > _MAX_EXIF or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"))


def _jpeg(data: bytes) -> bytes | None:
    """Application data and comments before the picture are left out, except JFIF, Exif and Adobe's colour transform."""
    parts, at = [data[:2]], 2
    for _ in range(_MAX_CHUNKS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return None
        kind = data[at + 1]
        if kind == 0xFF or kind == 0x01 or 0xD0 <= kind <= 0xD7:  # a fill byte, or a marker without data
            at += 1 if kind == 0xFF else 2
            continue
        if kind == 0xDA:  # the picture, up to the end of the file
            parts.append(data[at:])
            return b"".join(parts)
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        is_exif = kind == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0"
        if not (0xE1 <= kind <= 0xED or kind in (0xEF, 0xFE)) or is_exif:
            parts.append(data[at:end])
        at = end
    return None
