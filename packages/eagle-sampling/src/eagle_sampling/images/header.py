"""Width and height of an image from the first bytes of its file, after EXIF orientation; nothing is decoded.

`Reader` returns bytes by offset, so that a file costs one read of 4 KiB unless its header is further in.
Formats: JPEG (ITU T.81, EXIF 2.3), PNG, GIF, BMP, WebP (RFC 9649), TIFF 6.0 and BigTIFF, AVIF/HEIF (ISO 23008-12).
The parsers are strict: what a lenient decoder accepts may be a HeaderError here, and the caller falls back to the decoder.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

Reader = Callable[[int, int], bytes]  # (offset, size) -> at most size bytes

_BE16 = struct.Struct(">H").unpack_from
_BE32 = struct.Struct(">I").unpack_from
_PNG_SIZE = struct.Struct(">II").unpack_from
_JPEG_SOF = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_MAX_SEGMENTS = 4096  # marker segments of a JPEG before its frame header; a photo has a few dozen
_MAX_CHUNKS = 1 << 16  # of a PNG (its data may be chunks of 8 KiB), or blocks of a GIF before its first picture
_MAX_IFD_ENTRIES = 4096
_MAX_BOXES = 1024
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


class HeaderError(Exception):
    """The bytes do not hold a size; the caller adds the file's name."""


def parse_size(head: bytes, read: Reader, file_size: Callable[[], int]) -> tuple[int, int] | None:
    """(width, height) as displayed, or None when the format is not one of those above.

    `head`: the first bytes of the file (4 KiB, or all of a shorter one). Raises HeaderError when the header is damaged or states 0.
    """
    size = _parse(head, read, file_size)
    if size is not None and (size[0] <= 0 or size[1] <= 0):
        raise HeaderError(f"it states {size[0]} x {size[1]} pixels")
    return size


def _parse(head: bytes, read: Reader, file_size: Callable[[], int]) -> tuple[int, int] | None:
    try:
        if head[:2] == b"\xff\xd8":
            return _jpeg(head, read)
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return _png(head, read, file_size)
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp(head, read)
        if head[:6] in (b"GIF89a", b"GIF87a"):
            return _gif(head, read)
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff(read)
        if head[:2] == b"BM":
            return _bmp(head)
        if head[4:8] == b"ftyp" and _is_avif(head):
            return _avif(head, read)
    except (struct.error, IndexError) as error:
        raise HeaderError("the file ends inside its header") from error
    except (OverflowError, ValueError) as error:
        raise HeaderError("it points outside the file") from error
    return None


def _jpeg(head: bytes, read: Reader) -> tuple[int, int]:
    base, data = 0, head  # `data` is the window of the file that begins at `base`
    position, orientation = 2, 0  # 0: no EXIF block yet; later blocks only continue the first
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
            return (height, width) if orientation >= 5 else (width, height)
        if marker < 0xC0 and marker != 0x01:
            raise HeaderError(f"no JPEG marker at byte {position}")
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        if marker in (0xD9, 0xDA):
            raise HeaderError("the JPEG has no frame header before its data")
        length = _BE16(data, at + 2)[0]
        if length < 2:
            raise HeaderError(f"the JPEG segment at byte {position} has an impossible length")
        if marker == 0xE1 and not orientation and data[at + 4 : at + 10] == b"Exif\0\0":
            start = position + 10
            if at + 2 + length <= len(data):
                exif = data[at + 10 : at + 2 + length]
            else:
                exif = read(start, length - 8)
            orientation = exif_orientation(exif)
        position += 2 + length
    raise HeaderError(f"more than {_MAX_SEGMENTS} JPEG segments before the frame header")


def exif_orientation(exif: bytes) -> int:
    """The orientation (1-8) that an EXIF block states, with or without its prefix; 1 when it states none.

    Tag 274 of the first directory, one value of type SHORT (as EXIF requires) or LONG (as some programs write). `eagle_tiling.load_rgb`
    has the same function, so that the planned size is the size of the tiled picture; `tests/system` compares the two.
    """
    exif = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    if exif[:4] == b"II*\0":
        order, short, long = "little", b"\x12\1\3\0\1\0\0\0", b"\x12\1\4\0\1\0\0\0"
    elif exif[:4] == b"MM\0*":
        order, short, long = "big", b"\1\x12\0\3\0\0\0\1", b"\1\x12\0\4\0\0\0\1"
    else:
        return 1
    first = int.from_bytes(exif[4:8], order) + 2
    stop = first + 12 * int.from_bytes(exif[first - 2 : first], order)
    for entry, size in ((short, 2), (long, 4)):
        at = exif.find(entry, first, stop)
        while at >= 0 and (at - first) % 12:
            at = exif.find(entry, at + 1, stop)
        if at >= 0:
            value = int.from_bytes(exif[at + 8 : at + 8 + size], order)
            return value if 1 <= value <= 8 else 1
    return 1


def _png(head: bytes, read: Reader, file_size: Callable[[], int]) -> tuple[int, int]:
    if head[12:16] != b"IHDR":
        raise HeaderError("the PNG doesn't begin with IHDR")
    width, height = _PNG_SIZE(head, 16)
    position, data, base = 33, head, 0
    in_data = False
    for _ in range(_MAX_CHUNKS):  # an eXIf chunk may precede or follow the image data
        at = position - base
        if at + 8 > len(data):
            base, data, at = position, read(position, 64), 0
            if len(data) < 8:
                break
        (length,), kind = _BE32(data, at), data[at + 4 : at + 8]
        if kind == b"eXIf" and length < 1 << 20:
            return (height, width) if exif_orientation(read(position + 8, length)) >= 5 else (width, height)
        if kind == b"IEND" or (kind == b"fcTL" and in_data):  # fcTL: the next picture of an animation
            break
        if kind == b"IDAT" and not in_data and at + 20 + length > len(data):
            position = _after_idats(position, 12 + length, read, file_size())
        else:
            position += 12 + length
        in_data = in_data or kind == b"IDAT"
    return width, height


def _after_idats(position: int, step: int, read: Reader, file_size: int) -> int:
    """Offset of the chunk after the last IDAT, or after an earlier one; `position` and `step` are offset and size of the first.

    Encoders write IDATs of one size except the last, so that it is found without visiting the others (a hundred per MB from libpng).
    """
    last = position + (file_size - 8 - position) // step * step
    for target in (last, last - step):
        if target > position:
            found = read(target, 8)
            if found[4:] == b"IDAT" and (size := 12 + _BE32(found, 0)[0]) <= step:
                return target + size
    return position + step


def _gif(head: bytes, read: Reader) -> tuple[int, int]:
    """The logical screen, or the extent of the first picture where that is larger, as decoders show it."""
    width, height, flags = struct.unpack_from("<HHB", head, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    data, base, inside = head, 0, False  # inside: `position` is at a sub-block of an extension
    for _ in range(_MAX_CHUNKS):
        at = position - base
        if at + 10 > len(data):
            base, data, at = position, read(position, 4096), 0
        kind = data[at]
        if inside:
            position += 1 + kind
            inside = kind > 0
        elif kind == 0x21:
            position += 2
            inside = True
        elif kind == 0x2C:
            left, top, columns, rows = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, left + columns), max(height, top + rows)
        else:
            break
    raise HeaderError(f"the GIF has no picture at byte {position}")


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
            return (height, width) if exif_orientation(read(position + 8, min(size, 1 << 16))) >= 5 else (width, height)
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
        raise HeaderError(f"the TIFF directory states {count} entries")
    step = 20 if big else 12
    entries = read(start + (8 if big else 2), count * step)
    found = {256: 0, 257: 0, 274: 0}
    xmp = b""
    for at in range(0, len(entries) - step + 1, step):
        tag, kind, number = struct.unpack_from(order + ("HHQ" if big else "HHI"), entries, at)
        if tag in found:
            form = {3: "H", 4: "I", 16: "Q"}.get(kind)
            if form is None or number != 1:
                raise HeaderError(f"TIFF tag {tag} has the type {kind} and {number} values")
            (found[tag],) = struct.unpack_from(order + form, entries, at + step - (8 if big else 4))
        elif tag == 700 and not found[274]:
            (offset,) = struct.unpack_from(order + ("Q" if big else "I"), entries, at + step - (8 if big else 4))
            xmp = read(offset, min(number, 1 << 20))
    if not found[256] or not found[257]:
        raise HeaderError("the TIFF directory lacks the image's size")
    if not found[274] and (stated := _XMP_ORIENTATION.search(xmp)):
        found[274] = int(stated[1])  # Pillow applies it to a TIFF while decoding
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
