"""AV1 frames that a wanted frame depends on, read from the frame headers alone; all others are not decoded.

An AV1 frame names the slots that it may use: `ref_frame_idx` lists them, and everything else that it inherits (probabilities, segments,
motion fields, film grain) comes from the same slots (AV1 specification 5.9.2, 7.20, 7.21). So the graph is exact, and of an encoder's
pyramid only one branch is decoded: a few frames of a mini-GOP of 16 or 32. VP9 has no such graph: its frames also inherit motion vectors
and segments from the frame decoded before them, and nearly every frame updates the probabilities of all that follow. The reference lists
of H.264 and HEVC headers name frames whether they are used or not; there only unreferenced
frames are skipped (`dependencies.droppable_test`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SEQUENCE, FRAME_HEADER, TILE_GROUP, FRAME, REDUNDANT_HEADER = 1, 3, 4, 6, 7
KEY, INTER, INTRA_ONLY, SWITCH = range(4)
SLOTS = 8


class Unclear(Exception):
    """The headers use a feature that is not supported here, or are damaged: everything has to be decoded."""


class Bits:
    """Reads big-endian bit fields. Raises Unclear past the end."""

    def __init__(self, data: bytes):
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def __call__(self, count: int = 1) -> int:
        self.left -= count
        if self.left < 0:
            raise Unclear("the header is cut off")
        return self.value >> self.left & ((1 << count) - 1)


@dataclass(frozen=True)
class SequenceHeader:
    """Fields of a sequence header that frame headers need."""

    order_hint_bits: int
    screen_content: int  # 2: stated by each frame
    integer_mv: int  # 2: stated by each frame


@dataclass
class CodedFrame:
    """One frame of the stream: the sample that holds it, its byte spans in there, and the frames that it is predicted from."""

    sample: int
    spans: list[tuple[int, int]]
    shown: bool  # it appears at the sample's time
    uses: set[int]  # numbers of the frames that it depends on
    whole: bool = False  # complete: it shows an earlier frame, or its tiles have been read


def needed_parts(
    read: Callable[[int], bytes], samples: range, wanted: set[int], extradata: bytes
) -> dict[int, list[tuple[int, int]]] | None:
    """For the samples (temporal units) of a pass beginning at a keyframe: sample -> byte spans that the `wanted` samples' pictures need.

    read: the bytes of a sample. None when the headers do not state it, so that everything has to be decoded.
    """
    try:
        sequence = _find_sequence(extradata[4:]) if len(extradata) > 4 else None
        frames: list[CodedFrame] = []
        common: dict[int, list[tuple[int, int]]] = {}
        slots: list[int | None] = [None] * SLOTS
        keys: set[int] = set()
        for sample in samples:
            sequence, common[sample] = _read_unit(read(sample), sample, sequence, frames, slots, keys)
    except Unclear:
        return None
    needed = [frame.shown and frame.sample in wanted for frame in frames]
    for number in range(len(frames) - 1, -1, -1):  # a frame depends on earlier ones only
        if needed[number]:
            for other in frames[number].uses:
                needed[other] = True
    parts: dict[int, list[tuple[int, int]]] = {}
    for frame, use in zip(frames, needed):
        if use:
            parts.setdefault(frame.sample, []).extend(frame.spans)
    return {sample: sorted(common[sample] + spans) for sample, spans in parts.items()}


def units(data: bytes, *, whole: bool = True) -> list[tuple[int, int, int, int]]:
    """(type, begin, begin of payload, end) of every OBU (5.3). `data` may end inside the last one if not `whole`."""
    found, at = [], 0
    while at < len(data):
        head, begin = data[at], at
        if head & 0x80 or head & 0x04:
            raise Unclear("a forbidden bit, or layers")
        at += 1
        size = len(data) - at
        if head & 0x02:
            size = 0
            for shift in range(0, 56, 7):
                if at >= len(data):
                    raise Unclear("a size is cut off")
                size |= (data[at] & 0x7F) << shift
                at += 1
                if not data[at - 1] & 0x80:
                    break
        if at + size > len(data) and whole:
            raise Unclear("a unit is cut off")
        found.append((head >> 3 & 15, begin, at, at + size))
        at += size
    return found


def _find_sequence(data: bytes) -> SequenceHeader | None:
    for kind, _, payload, end in units(data):
        if kind == SEQUENCE:
            return _read_sequence(data[payload:end])
    return None


def _read_sequence(payload: bytes) -> SequenceHeader:
    """5.5.1, up to the order hints."""
    bits = Bits(payload)
    bits(3)
    if bits(2):  # still_picture, reduced_still_picture_header
        raise Unclear("a still picture")
    if bits():  # timing_info_present_flag
        bits(64)
        if bits():  # equal_picture_interval
            zeros = 0
            while not bits():
                zeros += 1
            bits(zeros)
        if bits():  # decoder_model_info_present_flag
            raise Unclear("a decoder model")
    delay = bits()
    for _ in range(bits(5) + 1):
        bits(12)  # operating_point_idc
        if bits(5) > 7:
            bits()
        if delay and bits():
            bits(4)
    widths, heights = bits(4) + 1, bits(4) + 1
    bits(widths)
    bits(heights)
    if bits():
        raise Unclear("frame ids")
    bits(3)  # 128 superblocks, filter intra, intra edge filter
    bits(4)  # interintra, masked, warped, dual filter
    order = bits()
    if order:
        bits(2)  # jnt_comp, ref_frame_mvs
    screen = 2 if bits() else bits()
    integer = 2
    if screen:
        integer = 2 if bits() else bits()
    return SequenceHeader(bits(3) + 1 if order else 0, screen, integer)


def _read_unit(
    data: bytes, sample: int, sequence: SequenceHeader | None, frames: list[CodedFrame], slots: list[int | None], keys: set[int]
) -> tuple[SequenceHeader | None, list[tuple[int, int]]]:
    """Adds a temporal unit's frames to `frames` and updates the slots. Returns the sequence header, and the spans of no frame."""
    common: list[tuple[int, int]] = []
    current: CodedFrame | None = None
    for kind, begin, payload, end in units(data):
        if kind in (TILE_GROUP, REDUNDANT_HEADER):
            if current is None:
                raise Unclear("tiles without a frame")
            current.spans.append((begin, end))
            current.whole = True
        elif kind in (FRAME, FRAME_HEADER):
            if sequence is None:
                raise Unclear("no sequence header")
            if current is not None and not current.whole:
                raise Unclear("a repeated header")
            current = _read_frame(Bits(data[payload : min(end, payload + 64)]), sequence, len(frames), slots, keys)
            current.sample, current.spans = sample, [(begin, end)]
            current.whole |= kind == FRAME
            frames.append(current)
        else:
            if kind == SEQUENCE:
                found = _read_sequence(data[payload:end])
                if frames and found != sequence:
                    raise Unclear("another sequence begins")
                sequence = found
            common.append((begin, end))
    return sequence, common


def _read_frame(bits: Bits, sequence: SequenceHeader, number: int, slots: list[int | None], keys: set[int]) -> CodedFrame:
    """5.9.2 up to the references. Updates `slots` (8 frame numbers) and `keys` (numbers of key frames) by 7.20 and 7.21."""
    if bits():  # show_existing_frame
        source = slots[bits(3)]
        if source is None:
            raise Unclear("a frame from before the keyframe")
        if source in keys:  # a key frame shown again: all slots hold it from now on
            keys.add(number)
            slots[:] = [number] * SLOTS
        return CodedFrame(0, [], True, {source}, True)
    kind, shown = bits(2), bool(bits())
    if not shown:
        bits()  # showable_frame
    resilient = kind == SWITCH or (kind == KEY and shown) or bool(bits())
    bits()  # disable_cdf_update
    screen = bits() if sequence.screen_content == 2 else sequence.screen_content
    if screen and sequence.integer_mv == 2:
        bits()
    if kind != SWITCH:
        bits()  # frame_size_override_flag
    bits(sequence.order_hint_bits)
    intra = kind in (KEY, INTRA_ONLY)
    if not intra and not resilient:
        bits(3)  # primary_ref_frame: one of the references
    refresh = 0xFF if kind == SWITCH or (kind == KEY and shown) else bits(8)
    if resilient and sequence.order_hint_bits and (not intra or refresh != 0xFF):
        bits(8 * sequence.order_hint_bits)
    uses: list[int | None] = []
    if not intra:
        if sequence.order_hint_bits and bits():  # frame_refs_short_signaling: derived from the hints of all slots
            uses = list(slots)
        else:
            uses = [slots[bits(3)] for _ in range(7)]
    known = {source for source in uses if source is not None}
    if None in uses:
        raise Unclear("a frame from before the keyframe")
    if kind == KEY:
        keys.add(number)
    for slot in range(SLOTS):
        if refresh >> slot & 1:
            slots[slot] = number
    return CodedFrame(0, [], shown, known)


def join(data: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """The bytes of the spans, one after the other."""
    return data if sum(end - begin for begin, end in spans) == len(data) else b"".join(data[begin:end] for begin, end in spans)
