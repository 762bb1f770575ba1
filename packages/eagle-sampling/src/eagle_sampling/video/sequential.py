"""Packets and frames through libavformat, for containers without a parser here (AVI, FLV, GIF, damaged transport streams)."""

from __future__ import annotations

from collections.abc import Callable

import av

from .beginning import DEFERRED
from .containers.demux import choose_stream
from .containers.track import Track
from .libav import at_rest, open_container

_REORDERED = 16  # most frames that a decoder of H.264 or HEVC holds: none is shown further before its place in the file


class PacketStream:
    """The video packets of a file by number, in one pass from the front; to go back, the file is opened again."""

    tolerant = False

    def __init__(self, path: str):
        self.path = path
        self.container = open_container(path)
        stream = choose_stream(self.container)
        self.context = stream.codec_context
        self.packets = (packet for packet in self.container.demux(stream) if packet.size)
        self.next = 0

    def begin(self, start: int, stop: int, wanted: set[int]) -> None:
        """Nothing to prepare."""

    def packet(self, sample: int, stop: int, wanted: bool) -> av.Packet | None:
        """Packet number `sample`, which is its `pts`. Raises av.InvalidDataError when the container marks it as damaged."""
        if sample < self.next:
            context = self.context  # keeps decoding; only the packets start over
            self.container.close()
            self.__init__(self.path)
            self.context = context
        for packet in self.packets:
            self.next += 1
            if self.next > sample:
                if packet.is_corrupt and not self.tolerant:
                    raise av.InvalidDataError(0, "lost or damaged in transport", self.path)
                packet.pts = sample
                return packet
        raise av.InvalidDataError(0, "the file ends before it", self.path)


def decode_linear(
    path: str,
    track: Track,
    wanted: set[int],
    paint: Callable[[av.VideoFrame, int], None],
    check: Callable[[], None],
    threads: int = 1,
    *,
    conceal: bool = False,
) -> tuple[set[int], str]:
    """Call `paint(frame, i)` for the i-th frame of the file, for i in `wanted`: for packets that do not state which frame they hold.

    check: called once per packet; raises when the time is up. conceal: paint what the decoder makes up for damage.
    Returns those of `wanted` that are not known to be right, and the reason.

    A packet without a frame would shift the numbers of all later frames if it went unnoticed. So packets are followed through the decoder,
    and decoding continues after the last wanted frame until no packet is left that could have been shown before it.
    """
    last = max(wanted)
    painted: set[int] = set()
    pending: dict[int, None] = {}  # packets whose frames are still to come, in file order
    sent = shown = 0
    reason = "some packets before it give no frame, so that its number is not known"
    try:
        with open_container(path) as container, at_rest(choose_stream(container).codec_context) as context:
            threads = 1 if track.opens else threads  # so that an error is raised at its own packet
            context.thread_count = threads
            context.thread_type = "FRAME" if threads > 1 else "NONE"
            context.options = {  # as in `Decoder`
                **({} if conceal else {"err_detect": "explode"}),
                **({"strict": "1"} if track.codec == "h264" else {}),
            }
            number = 0
            for packet in container.demux(choose_stream(container)):
                check()
                if packet.size and not packet.is_discard:
                    number += 1
                    if number - 1 in track.silent:
                        continue
                    packet.pts = sent
                    pending[sent] = None
                    sent += 1
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    if conceal:
                        continue
                    if not track.opens or track.codec != "h264" or sent > DEFERRED:
                        raise
                    continue  # as in `Decoder`: it stays among the pending packets unless its picture is whole
                for frame in frames:
                    if frame.is_corrupt and not conceal:
                        raise av.InvalidDataError(0, "the picture is incomplete", path)
                    if track.whole and frame.pts is not None:
                        pending.pop(frame.pts, None)
                    else:
                        pending.clear()
                    if shown in wanted:
                        paint(frame, shown)
                        painted.add(shown)
                    shown += 1
                oldest = next(iter(pending), sent)
                if shown > last and (oldest > last + _REORDERED or sent > last + 8 * _REORDERED + threads):
                    break
    except (av.FFmpegError, OSError) as error:
        reason = f"decoding failed after frame {shown} of the file: {error.strerror or error}"
    sure = min(pending, default=sent + _REORDERED + 1) - _REORDERED
    return {i for i in wanted if i not in painted or i >= sure}, reason
