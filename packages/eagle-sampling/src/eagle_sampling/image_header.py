"""Width and height of an image from the first bytes of its file, after EXIF orientation; nothing is decoded.

`Reader` hands out bytes by offset, so that a file costs one read of 4 KiB unless its header lies further in.
Formats: JPEG (ITU T.81, EXIF 2.3), PNG, GIF, BMP, WebP (RFC 9649), TIFF 6.0 and BigTIFF, AVIF/HEIF (ISO 23008-12).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

Reader = Callable[[int, int], bytes]  # (offset, size) -> at most size bytes

_BE16 = struct.Struct(">H").unpack_from
_BE32 = struct.Struct(">I").unpack_from
_PNG_SIZE = struct.Struct(">II").unpack_from
_JPEG_SOF = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_MAX_SEGMENTS = 4096  # a JPEG with more marker segments before its frame header is an attack, not a photo
_MAX_IFD_ENTRIES = 4096
_MAX_BOXES = 1024


class HeaderError(Exception):
    """The bytes don't hold a size; the caller adds the file's name."""


def parse_size(head: bytes, read: Reader) -> tuple[int, int] | None:
    """(width, height) as displayed, or None when the format isn't one of those above.

    `head`: the first bytes of the file (4 KiB, or all of a shorter one). Raises HeaderError when the header is damaged.
    """
    try:
        if head[:2] == b"\xff\xd8":
            return _jpeg(head, read)
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return _png(head, read)
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp(head, read)
        if head[:6] in (b"GIF89a", b"GIF87a"):
            return struct.unpack_from("<HH", head, 6)
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff(read)
        if head[:2] == b"BM":
            return _bmp(head)
        if head[4:8] == b"ftyp" and _is_avif(head):
            return _avif(head, read)
    except (struct.error, IndexError) as error:
        raise HeaderError("the file ends inside its header") from error
    return None


def _jpeg(head: bytes, read: Reader) -> tuple[int, int]:
    base, data = 0, head  # `data` is the window of the file that begins at `base`
    position, swapped = 2, False
    for _ in range(_MAX_SEGMENTS):
        at = position - base
        if at + 10 > len(data):
            base, data = position, read(position, 4096)
            at = 0
            if len(data) < 10:
                raise HeaderError("the file ends before the JPEG frame header")
        if data[at] != 0xFF:
            raise HeaderError(f"no JPEG marker at byte {position}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _JPEG_SOF:
            height, width = _BE16(data, at + 5)[0], _BE16(data, at + 7)[0]
            return (height, width) if swapped else (width, height)
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        if marker in (0xD9, 0xDA):
            raise HeaderError("the JPEG has no frame header before its data")
        length = _BE16(data, at + 2)[0]
        if length < 2:
            raise HeaderError(f"the JPEG segment at byte {position} has an impossible length")
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            start = position + 10
            if at + 2 + length <= len(data):
                exif = data[at + 10 : at + 2 + length]
            else:
                exif = read(start, length - 8)
            swapped = exif_swaps_axes(exif)
        position += 2 + length
    raise HeaderError(f"more than {_MAX_SEGMENTS} JPEG segments before the frame header")


def exif_swaps_axes(exif: bytes) -> bool:
    """True when the TIFF block of an EXIF header holds an orientation (5-8) that exchanges width and height."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 14:
        return False
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        return False
    (count,) = struct.unpack_from(order + "H", exif, start)
    tag = b"\x12\x01" if order == "<" else b"\x01\x12"
    entries = exif[start + 2 : start + 2 + 12 * count]
    at = entries.find(tag)
    while at >= 0 and at % 12:
        at = entries.find(tag, at + 1)
    if at < 0 or at + 10 > len(entries):
        return False
    return 5 <= struct.unpack_from(order + "H", entries, at + 8)[0] <= 8


def _png(head: bytes, read: Reader) -> tuple[int, int]:
    if head[12:16] != b"IHDR":
        raise HeaderError("the PNG doesn't begin with IHDR")
    width, height = _PNG_SIZE(head, 16)
    position, data, base = 33, head, 0
    for _ in range(64):  # an eXIf chunk may stand anywhere before the image data
        if position + 8 - base > len(data):
            base, data = position, read(position, 64)
        if len(data) < position + 8 - base:
            break
        (length,), kind = _BE32(data, position - base), data[position - base + 4 : position - base + 8]
        if kind == b"eXIf" and length < 1 << 20:
            return (height, width) if exif_swaps_axes(read(position + 8, length)) else (width, height)
        if kind in (b"IDAT", b"IEND"):
            break
        position += 12 + length
    return width, height


def _webp(head: bytes, read: Reader) -> tuple[int, int]:
    kind = head[12:16]
    if kind == b"VP8 ":
        if head[23:26] != b"\x9d\x01\x2a":
            raise HeaderError("the WebP has no VP8 key frame")
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind != b"VP8X":
        raise HeaderError("the WebP has no image chunk")
    width = int.from_bytes(head[24:27], "little") + 1
    height = int.from_bytes(head[27:30], "little") + 1
    if not head[20] & 0x08:  # no EXIF chunk
        return width, height
    position = 30
    for _ in range(_MAX_BOXES):
        chunk = read(position, 8)
        if len(chunk) < 8:
            break
        size = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"EXIF":
            exif = read(position + 8, min(size, 1 << 16))
            exif = exif[6:] if exif[:6] == b"Exif\0\0" else exif
            return (height, width) if exif_swaps_axes(exif) else (width, height)
        position += 8 + size + (size & 1)
    return width, height


def _bmp(head: bytes) -> tuple[int, int]:
    (size,) = struct.unpack_from("<I", head, 14)
    if size == 12:
        return struct.unpack_from("<HH", head, 18)
    width, height = struct.unpack_from("<ii", head, 18)
    return width, abs(height)


def _tiff(read: Reader) -> tuple[int, int]:
    head = read(0, 16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2 if order == "<" else 3] == 0x2B
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)
    (count,) = struct.unpack(order + ("Q" if big else "H"), read(start, 8 if big else 2))
    if count > _MAX_IFD_ENTRIES:
        raise HeaderError(f"the TIFF directory claims {count} entries")
    step = 20 if big else 12
    entries = read(start + (8 if big else 2), count * step)
    found = {256: 0, 257: 0, 274: 1}
    for at in range(0, len(entries) - step + 1, step):
        tag, kind = struct.unpack_from(order + "HH", entries, at)
        if tag in found:
            form = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
            if form is None:
                raise HeaderError(f"TIFF tag {tag} has the type {kind}")
            (found[tag],) = struct.unpack_from(order + form, entries, at + (12 if big else 8))
    if not found[256] or not found[257]:
        raise HeaderError("the TIFF directory lacks the image's size")
    return (found[257], found[256]) if 5 <= found[274] <= 8 else (found[256], found[257])


def _is_avif(head: bytes) -> bool:
    size = min(_BE32(head, 0)[0], len(head))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, size, 4))}
    return bool(brands & {b"avif", b"avis", b"mif1", b"heic", b"heix", b"msf1"})


def _avif(head: bytes, read: Reader) -> tuple[int, int]:
    """Size of the primary item: the properties associated with `pitm` in `ipma` (ISO 23008-12, section 9.3), turned by `irot`."""
    position = 0
    meta = b""
    for _ in range(_MAX_BOXES):
        box = read(position, 16)
        if len(box) < 8:
            break
        size = _BE32(box, 0)[0]
        if size == 1:
            size = int.from_bytes(box[8:16], "big")
        if box[4:8] == b"meta":
            meta = read(position + 12, min(size - 12, 1 << 20))
            break
        if size < 8:
            break
        position += size
    parts = dict(_boxes(meta))
    properties = dict(_boxes(parts.get(b"iprp", b"")))
    if b"ipco" not in properties:
        raise HeaderError("the AVIF has no item properties")
    items = _boxes(properties[b"ipco"])
    pitm = parts.get(b"pitm", b"")
    primary = int.from_bytes(pitm[4:8] if pitm[:1] == b"\1" else pitm[4:6], "big")
    wanted = _associated(properties.get(b"ipma", b""), primary) or range(1, len(items) + 1)
    width = height = turns = 0
    for index in wanted:
        if not 1 <= index <= len(items):
            continue
        kind, body = items[index - 1]
        if kind == b"ispe" and not width:
            width, height = _BE32(body, 4)[0], _BE32(body, 8)[0]
        elif kind == b"irot":
            turns = body[0] & 3
    if not width:
        raise HeaderError("the AVIF's primary image has no size")
    return (height, width) if turns % 2 else (width, height)


def _boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """Children of an ISO box as (type, body), in order."""
    found, at = [], 0
    while at + 8 <= len(data) and len(found) < _MAX_BOXES:
        size = _BE32(data, at)[0]
        if size < 8:
            break
        found.append((data[at + 4 : at + 8], data[at + 8 : at + size]))
        at += size
    return found


def _associated(ipma: bytes, item: int) -> list[int]:
    version, wide = ipma[0] if ipma else 0, bool(ipma[3] & 1) if ipma else False
    count = int.from_bytes(ipma[4:8], "big")
    at = 8
    for _ in range(min(count, _MAX_BOXES)):
        id_size = 4 if version else 2
        current = int.from_bytes(ipma[at : at + id_size], "big")
        links = ipma[at + id_size]
        at += id_size + 1
        step = 2 if wide else 1
        if current == item:
            mask = 0x7FFF if wide else 0x7F
            return [int.from_bytes(ipma[at + i * step : at + (i + 1) * step], "big") & mask for i in range(links)]
        at += links * step
    return []
