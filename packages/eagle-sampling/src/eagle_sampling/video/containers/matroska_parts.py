"""The parts of a Matroska file that hold the frames of wanted times, for remote files: header, cues, and the blocks from keyframes on.

Exact times of all frames need every block, hence all of the file: a block's time is stored with the block. Frames of given times do not:
cues name keyframes by time and place, what is stored before a keyframe is shown before it, and decoders hold few frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...choose import TIME_EPSILON
from ...limits import Limits
from ..beginning import start_of
from ..keyframes import Start, StartOf, start_test
from .matroska import CLUSTER, Header, children, element_of, read_header, track_of
from .source import Damaged, Source
from .track import Track, Unsupported

_TIME, _SIMPLE_BLOCK, _GROUP, _BLOCK, _REFERENCE = 0xE7, 0xA3, 0xA0, 0xA1, 0xFB
_HELD = {"h264": 16, "hevc": 16}
"""Frames that a decoder holds at most: after more of later times, none of an earlier one is stored. Other codecs here don't reorder."""
_SMALLEST, _LARGEST = 1 << 16, 1 << 20
_FOREIGN = 10_000  # elements without a block of the track that are passed at most

Block = tuple[int, int, int, bool]
"""(offset, size, tick, keyframe), as `scan_blocks` gives them."""


@dataclass(frozen=True)
class Part:
    """track: consecutive samples of the file, from a keyframe on. wanted: int64, which of the times their frames are at."""

    track: Track
    wanted: NDArray[np.int64]


@dataclass(frozen=True)
class Cues:
    """Keyframes of the index, int64 [n] each, rising. clusters: bytes from the segment's start; places: from the cluster's body, or -1."""

    ticks: NDArray[np.int64]
    clusters: NDArray[np.int64]
    places: NDArray[np.int64]


def read_matroska_parts(source: Source, limits: Limits, seconds: NDArray[np.float64], tolerance: float) -> list[Part]:
    """Parts that together hold the frame on the screen at each of `seconds`, the keyframes up to `tolerance` from it, and all that these
    frames depend on.

    Raises Unsupported where cues are missing, not in order or not of keyframes, or a time is not between frames; Damaged for what can't be
    read. Then the whole file tells.
    """
    header = read_header(source, walk=False)
    cues = read_cues(header)
    track = track_of(header, cues.ticks, np.ones(len(cues.ticks), bool), None, None, 0)
    test = start_test(header.codec, header.extradata)
    if test is None:
        raise Unsupported(f"{header.codec} has no test for keyframes")
    order = np.argsort(seconds, kind="stable")
    at = np.searchsorted(track.at(cues.ticks), seconds[order] + TIME_EPSILON, side="right") - 1
    if len(at) and at[0] < 0:
        raise Unsupported("a time before the first cue")
    found: list[tuple[list[Block], list[int]]] = []
    walk: Iterator[Block] = iter(())
    end = -1  # of the blocks that were walked
    for wanted, cue in zip(order.tolist(), at.tolist()):
        if not found or header.segment + int(cues.clusters[cue]) + int(max(cues.places[cue], 0)) > end:
            walk = _from_cue(source, header, cues, cue)
            first = next(walk)
            if start_of(test, source, first[0], first[1]) not in (Start.CLEAN, Start.OPEN):
                raise Unsupported("a cue at a frame where decoding can't begin")
            found.append(([first], []))
        blocks, members = found[-1]
        members.append(wanted)
        _go_past(source, track, test, walk, blocks, float(seconds[wanted]) + tolerance, limits)
        end = blocks[-1][0] + blocks[-1][1]
    return [_part(header, blocks, members) for blocks, members in found]


def _go_past(
    source: Source, track: Track, test: StartOf, walk: Iterator[Block], blocks: list[Block], second: float, limits: Limits
) -> None:
    """Add blocks until no later one can be shown at or before `second`."""
    held = _HELD.get(track.codec, 0)
    after = int(np.count_nonzero(track.at(np.array([block[2] for block in blocks], np.int64)) > second + TIME_EPSILON))
    for block in walk if after <= held else ():
        blocks.append(block)
        if len(blocks) > limits.max_frames:
            raise Damaged("more frames than the limit allows")
        if track.at(np.array([block[2]], np.int64))[0] <= second + TIME_EPSILON:
            continue
        after += 1
        # What is stored after an IDR frame of H.264 is shown after it; in HEVC leading pictures may follow one.
        if after > held or (block[3] and track.codec == "h264" and start_of(test, source, *block[:2]) is Start.CLEAN):
            return


def _part(header: Header, blocks: list[Block], members: list[int]) -> Part:
    offsets, sizes, ticks, keys = (np.array(column) for column in zip(*blocks))
    return Part(track_of(header, ticks, keys, offsets, sizes, 0), np.array(members, np.int64))


def read_cues(header: Header) -> Cues:
    """The cues of the header's track. Raises Unsupported when there are none, or times or places don't rise."""
    found: dict[int, tuple[int, int]] = {}
    for kind, point in children(header.cue_data):
        if kind != 0xBB:
            continue
        parts = children(point)
        tick = _number(parts, 0xB3, -1)
        for inner, body in parts:
            positions = children(body) if inner == 0xB7 else []
            if positions and _number(positions, 0xF7, -1) == header.number and tick not in found:
                found[tick] = _number(positions, 0xF1, -1), _number(positions, 0xF0, -1)
    ticks = np.array(sorted(found), np.int64)
    clusters, places = (np.array([found[tick][column] for tick in ticks.tolist()], np.int64) for column in (0, 1))
    if not len(ticks) or ticks[0] < 0 or clusters.min() < 0:
        raise Unsupported("no cues of the video track")
    steps = np.diff(clusters)
    if (steps < 0).any() or ((steps == 0) & (np.diff(places) <= 0) & (places[1:] >= 0)).any():
        raise Unsupported("cues out of order")
    return Cues(ticks, clusters, places)


def _number(elements: list[tuple[int, bytes]], wanted: int, otherwise: int) -> int:
    return next((int.from_bytes(body, "big") for kind, body in elements if kind == wanted), otherwise)


def _from_cue(source: Source, header: Header, cues: Cues, cue: int) -> Iterator[Block]:
    """The keyframe of a cue, and the blocks stored after it. Raises Unsupported when no such keyframe is there."""
    tick, place = int(cues.ticks[cue]), int(cues.places[cue])
    blocks = walk_blocks(source, header, header.segment + int(cues.clusters[cue]), place)
    for block in blocks:
        if block[2] == tick and block[3]:
            yield block
            break
        if place >= 0:
            raise Unsupported("a cue that isn't that of a keyframe")
    else:
        raise Unsupported("a cue that isn't that of a keyframe")
    yield from blocks


class _Ahead:
    """Bytes of a file by offset, read in pieces that grow to 1 MiB as a reader goes on."""

    def __init__(self, source: Source) -> None:
        self.source, self.start, self.piece = source, 0, b""
        self.size = _SMALLEST

    def at(self, offset: int, size: int) -> bytes:
        """`size` bytes, fewer at the file's end."""
        place = offset - self.start
        if place < 0 or place + size > len(self.piece):
            self.start, self.piece, place = offset, self.source.read(offset, max(size, self.size)), 0
            self.size = min(2 * self.size, _LARGEST)
        return self.piece[place : place + size]


def walk_blocks(source: Source, header: Header, cluster: int, place: int = -1) -> Iterator[Block]:
    """The track's blocks in file order, from the cluster at byte `cluster`; in it from `place` bytes behind its head, if that is not -1.

    Raises Unsupported for laced blocks and clusters of unknown size, Damaged for what is not a cluster or overruns it.
    """
    ahead = _Ahead(source)
    at, end = cluster, min(header.segment_end, source.size)
    while at + 2 <= end:
        kind, body, size = element_of(ahead.at(at, 12), at)
        if size < 0:
            raise Unsupported("an element of unknown size")
        if kind != CLUSTER and at == cluster:
            raise Unsupported("a cue that isn't that of a cluster")
        if body + size > source.size:
            raise Damaged("a cluster is cut off")
        if kind == CLUSTER:
            yield from _cluster_blocks(ahead, header.number, body, body + size, place if at == cluster else -1)
        at = body + size


def _cluster_blocks(ahead: _Ahead, number: int, at: int, end: int, place: int) -> Iterator[Block]:
    base, foreign, first = 0, 0, at
    while at < end:
        kind, body, size = element_of(ahead.at(at, 12), at)
        if size < 0 or body + size > end:
            raise Damaged("an element overruns its cluster")
        block = None
        if kind == _TIME:
            base = int.from_bytes(ahead.at(body, min(size, 8)), "big")
            if place > 0:
                at, place = first + place, -1
                continue
        elif kind == _SIMPLE_BLOCK:
            block = _block(ahead, number, body, size, base, simple=True)
        elif kind == _GROUP:
            block = _group_block(ahead, number, body, body + size, base)
        if block is not None:
            yield block
        foreign = 0 if block is not None else foreign + 1
        if foreign > _FOREIGN:
            raise Unsupported("clusters with little video")
        at = body + size


def _group_block(ahead: _Ahead, number: int, at: int, end: int, base: int) -> Block | None:
    """The block of a group; one that a ReferenceBlock follows is not a keyframe."""
    block, refers = None, False
    while at < end:
        kind, body, size = element_of(ahead.at(at, 12), at)
        if size < 0 or body + size > end:
            raise Damaged("an element overruns its group")
        if kind == _BLOCK and block is None:
            block = _block(ahead, number, body, size, base, simple=False)
        refers = refers or kind == _REFERENCE
        at = body + size
    return None if block is None else (*block[:3], not refers)


def _block(ahead: _Ahead, number: int, body: int, size: int, base: int, *, simple: bool) -> Block | None:
    """None for a block of another track."""
    head = ahead.at(body, 4)
    if head[:1] != bytes([0x80 | number]):
        return None
    if size < 4:
        raise Damaged("a block is shorter than its header")
    if head[3] & 0x06:
        raise Unsupported("laced video blocks")
    return body + 4, size - 4, base + int.from_bytes(head[1:3], "big", signed=True), not simple or bool(head[3] & 0x80)
