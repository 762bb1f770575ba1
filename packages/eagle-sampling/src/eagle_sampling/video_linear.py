"""Packets and frames through libavformat, for containers whose bytes we can't find ourselves (AVI, FLV, GIF, damaged transport streams)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import av

from .limits import MediaError


class PacketStream:
    """The video packets of a file by number, in one pass from the front; going back opens the file again."""

    def __init__(self, path: str):
        self.path = path
        self.container = av.open(path, metadata_errors="ignore")
        stream = self.container.streams.video[0]
        self.context = stream.codec_context
        self.packets = (packet for packet in self.container.demux(stream) if packet.size)
        self.next = 0

    def begin(self, start: int, stop: int, wanted: set[int]) -> None:
        """Nothing to prepare."""

    def packet(self, sample: int, stop: int, wanted: bool) -> av.Packet | None:
        """Packet number `sample`. Raises av.InvalidDataError when the container marks it as damaged."""
        if sample < self.next:
            context = self.context  # goes on decoding; only the packets start over
            self.container.close()
            self.__init__(self.path)
            self.context = context
        for packet in self.packets:
            self.next += 1
            if self.next > sample:
                if packet.is_corrupt:
                    raise av.InvalidDataError(0, "lost or damaged in transport", self.path)
                return packet
        raise av.InvalidDataError(0, "the file ends before it", self.path)


def decode_linear(path: str, wanted: set[int], check: Callable[[], None]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(ticks, frame) for every presentation tick in `wanted`, decoding everything: for packets that carry no times.

    check: called once per packet; raises when the time is up. Raises MediaError when the decoder fails.
    """
    left = set(wanted)
    at = None
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.options = {"err_detect": "explode"}
            for packet in container.demux(stream):
                check()
                for frame in packet.decode():
                    at = frame.pts
                    if frame.pts in left:
                        left.discard(frame.pts)
                        yield frame.pts, frame
                if not left:
                    return
    except (av.FFmpegError, OSError) as error:
        where = "at its start" if at is None else f"after tick {at}"
        raise MediaError(f"{path}: decoding failed {where}: {error}") from error
