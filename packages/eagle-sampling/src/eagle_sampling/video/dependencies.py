"""Samples that have to be decoded to get the wanted frames: targets grouped by the keyframe at which their decoding begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .containers.track import Track
from .keyframes import Start

Droppable = Callable[[bytes], bool]


@dataclass(frozen=True)
class Group:
    """Decode samples `start` ... `stop - 1`, in order, to get the frames of `targets` (sample numbers, sorted)."""

    start: int
    targets: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.targets[-1] + 1

    @property
    def cost(self) -> int:
        """Samples to decode, and two for starting and draining the decoder."""
        return self.stop - self.start + 2


def group_targets(track: Track, samples: NDArray[np.int64]) -> list[Group]:
    """Groups for the wanted `samples` (decode order numbers), each beginning at the last keyframe from which they can all be decoded.

    A frame that is shown before its keyframe but stored after it (a leading picture of an open GOP) needs the keyframe before that one.
    """
    sync = np.flatnonzero(track.sync)
    wanted = np.unique(samples)
    at = np.searchsorted(sync, wanted, side="right") - 1
    leading = (at > 0) & (track.ticks[sync[at]] > track.ticks[wanted])
    while leading.any():
        at[leading] -= 1
        leading = (at > 0) & (track.ticks[sync[at]] > track.ticks[wanted])
    starts = sync[np.maximum(at, 0)]
    return [
        Group(int(start), tuple(wanted[starts == start].tolist()))
        for start in np.unique(starts)  # few: at most one per target
    ]


def correct_keyframes(track: Track, samples: NDArray[np.int64], start_at: Callable[[int], Start | None]) -> None:
    """Remove from `track.sync` the samples at which decoding would begin for the wanted `samples`, and cannot.

    start_at: what decoding gives that begins at a sample, by its bytes; None: not known. The first keyframe stays. Of a keyframe of an
    open GOP the one before is corrected too, because decoding may have to begin there.
    """
    known: dict[int, Start | None] = {}
    while True:
        sync = np.flatnonzero(track.sync)
        wrong = False

        def correct(at: int, sync: NDArray[np.int64] = sync) -> int:
            """The place in `sync` of the last keyframe up to place `at` that is one."""
            nonlocal wrong
            while at > 0:
                sample = int(sync[at])
                if sample not in known:
                    known[sample] = start_at(sample)
                if known[sample] is not Start.NONE:
                    break
                track.sync[sample] = False
                wrong = True
                at -= 1
            return at

        for group in group_targets(track, samples):
            at = correct(int(np.searchsorted(sync, group.start)))
            if at > 0 and known[int(sync[at])] in (Start.OPEN, Start.REFRESH):
                correct(at - 1)
        if not wrong:
            return


def earlier_start(track: Track, start: int, attempt: int) -> int | None:
    """Where to begin when decoding from `start` did not give a frame: 1, then 4 keyframes earlier, then the front; None after that.

    H.264 streams with periodic intra refresh mark frames as keyframes from which the picture only builds up.
    """
    if start == 0 or attempt > 2:
        return None
    sync = np.flatnonzero(track.sync[:start])
    back = {0: 1, 1: 4}.get(attempt)
    return int(sync[-back]) if back is not None and back <= len(sync) else 0


def droppable_test(codec: str, extradata: bytes) -> Droppable | None:
    """A test whether no other frame refers to a sample, so that it need not be decoded; None when the codec has no cheap one.

    H.264 (ITU-T H.264, 7.4.1): nal_ref_idc 0. HEVC (ITU-T H.265, 7.4.2.2): a sub-layer non-reference picture of the highest temporal layer.
    """
    if codec == "h264" and len(extradata) > 4 and extradata[0] == 1:
        return _h264_lengths((extradata[4] & 3) + 1)
    if codec == "h264" and (not extradata or extradata[0] == 0):
        return _h264_start_codes
    if codec == "hevc" and len(extradata) > 21 and extradata[0] == 1:
        layers = extradata[21] >> 3 & 7
        return _hevc_lengths((extradata[21] & 3) + 1, layers) if layers else None
    return None


def _h264_lengths(length: int) -> Droppable:
    def droppable(data: bytes) -> bool:
        at, end, found = 0, len(data), False
        while at + length < end:
            head = data[at + length]
            if 1 <= head & 0x1F <= 5:
                if head & 0x60:
                    return False
                found = True
            at += length + int.from_bytes(data[at : at + length], "big")
        return found

    return droppable


def _h264_start_codes(data: bytes) -> bool:
    at, found = data.find(b"\0\0\1"), False
    while 0 <= at < len(data) - 3:
        head = data[at + 3]
        if 1 <= head & 0x1F <= 5:
            if head & 0x60:
                return False
            found = True
        at = data.find(b"\0\0\1", at + 3)
    return found


def _hevc_lengths(length: int, layers: int) -> Droppable:
    def droppable(data: bytes) -> bool:
        at, end, found = 0, len(data), False
        while at + length + 1 < end:
            kind, layer = data[at + length] >> 1 & 0x3F, (data[at + length + 1] & 7) - 1
            if kind < 32:
                if kind > 14 or kind & 1 or layer != layers - 1:
                    return False
                found = True
            at += length + int.from_bytes(data[at : at + length], "big")
        return found

    return droppable
