"""Where decoding may begin, by the first bytes of a coded frame: containers mark too many, too few or other frames.

Sources: H.264 7.3.3, 7.4.1 and D.2.8; H.265 7.4.2.2; RFC 6386 9.1; VP9 6.2; AV1 5.9.2; MPEG-2 6.2.3; MPEG-4 Part 2 6.2.5; H.263 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum

from .av1 import FRAME, FRAME_HEADER, SEQUENCE, Unclear, units


class Start(IntEnum):
    """What decoding gives that begins at a coded frame.

    NONE: no exact picture. REFRESH: exact pictures some frames later (H.264 periodic intra refresh). OPEN: the frame, and all that are
    shown after it. CLEAN: the frame, and all that are stored after it.
    """

    NONE = 0
    REFRESH = 1
    OPEN = 2
    CLEAN = 3


StartOf = Callable[[bytes], "Start | None"]


def start_test(codec: str, extradata: bytes) -> StartOf | None:
    """The test for a codec; None when there is none. The test returns None when the bytes do not hold the fields that it needs."""
    lengths = 0
    if codec == "h264" and len(extradata) > 4 and extradata[0] == 1:
        lengths = (extradata[4] & 3) + 1
    elif codec == "hevc" and len(extradata) > 21 and extradata[0] == 1:
        lengths = (extradata[21] & 3) + 1
    if codec == "h264":
        return lambda data: _h264(_nal_units(data, lengths))
    if codec == "hevc":
        return lambda data: _hevc(_nal_units(data, lengths))
    return _TESTS.get(codec)


def _nal_units(data: bytes, lengths: int) -> Iterator[bytes]:
    """The first 256 bytes of each NAL unit; `lengths`: bytes of the sizes before them, 0 for start codes."""
    if lengths:
        at = 0
        while at + lengths < len(data):
            size = int.from_bytes(data[at : at + lengths], "big")
            at += lengths
            yield data[at : at + min(size, 256)]
            at += size
        return
    at = data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        yield data[at + 3 : at + 259]
        at = data.find(b"\0\0\1", at + 3)


def _h264(units: Iterator[bytes]) -> Start | None:
    recovers = False
    for unit in units:
        kind = unit[0] & 0x1F
        if kind == 5:
            return Start.CLEAN
        if kind == 6:
            recovers = recovers or _has_recovery_point(unit)
        elif kind in (1, 2):
            kind_of_slice = _slice_type(unit[1:9])
            if kind_of_slice is None:
                return None
            return Start.OPEN if kind_of_slice % 5 in (2, 4) else Start.REFRESH if recovers else Start.NONE
    return None


def _has_recovery_point(unit: bytes) -> bool:
    at = 1
    while at + 1 < len(unit):
        numbers = []
        for _ in range(2):  # type and size of a message, in bytes of 255 and a last one
            value = 0
            while at < len(unit) and unit[at] == 255:
                value, at = value + 255, at + 1
            if at >= len(unit):
                return False
            numbers.append(value + unit[at])
            at += 1
        if numbers[0] == 6:
            return True
        at += numbers[1]
    return False


def _slice_type(data: bytes) -> int | None:
    """The second Exp-Golomb number of a slice header."""
    bits = "".join(f"{byte:08b}" for byte in data.replace(b"\0\0\3", b"\0\0"))
    at, value = 0, None
    for _ in range(2):
        zeros = bits.find("1", at) - at
        if zeros < 0 or at + 2 * zeros + 1 > len(bits):
            return None
        value = int(bits[at + zeros : at + 2 * zeros + 1], 2) - 1
        at += 2 * zeros + 1
    return value


def _hevc(units: Iterator[bytes]) -> Start | None:
    for unit in units:
        kind = unit[0] >> 1 & 0x3F
        if kind < 32:
            return Start.CLEAN if kind in (19, 20) else Start.OPEN if 16 <= kind <= 23 else Start.NONE
    return None


def _vp8(data: bytes) -> Start | None:
    return None if not data else Start.NONE if data[0] & 1 else Start.CLEAN


def _vp9(data: bytes) -> Start | None:
    if not data or data[0] >> 6 != 2:
        return None
    bits = f"{data[0]:08b}"[4 + (data[0] & 0x30 == 0x30) :]  # after the marker, the profile and a reserved bit of profile 3
    return Start.CLEAN if bits.startswith("00") else Start.NONE  # not a frame shown again, and a key frame


def _av1(data: bytes) -> Start | None:
    sequence = False
    try:
        for kind, _, payload, _ in units(data, whole=False):
            sequence = sequence or kind == SEQUENCE
            if kind in (FRAME, FRAME_HEADER) and payload < len(data):
                return Start.CLEAN if data[payload] & 0xE0 == 0 else Start.NONE
    except Unclear:
        return None
    return None


def _mpeg12(data: bytes) -> Start | None:
    at = data.find(b"\0\0\1\0")
    if not 0 <= at < len(data) - 5:
        return None
    return Start.OPEN if data[at + 5] >> 3 & 7 == 1 else Start.NONE


def _mpeg4(data: bytes) -> Start | None:
    at = data.find(b"\0\0\1\xb6")
    if not 0 <= at < len(data) - 4:
        return None
    return Start.OPEN if data[at + 4] >> 6 == 0 else Start.NONE


def _h263(data: bytes) -> Start | None:
    if len(data) < 6 or data[:2] != b"\0\0" or data[2] & 0xFC != 0x80:
        return None
    head = int.from_bytes(data[:6], "big")
    if head >> 10 & 7 == 7:  # an extended header
        return None
    return Start.NONE if head >> 9 & 1 else Start.CLEAN


def _flv(data: bytes) -> Start | None:
    if len(data) < 10 or data[:2] != b"\0\0" or data[2] & 0x80 == 0:
        return None
    head = int.from_bytes(data[:10], "big")
    size = head >> 47 & 7
    after = 33 + {0: 16, 1: 32}.get(size, 0)
    return Start.CLEAN if head >> 78 - after & 3 == 0 else Start.NONE


_TESTS: dict[str, StartOf] = {
    "vp8": _vp8,
    "vp9": _vp9,
    "av1": _av1,
    "mpeg1video": _mpeg12,
    "mpeg2video": _mpeg12,
    "mpeg4": _mpeg4,
    "h263": _h263,
    "flv": _flv,
}
