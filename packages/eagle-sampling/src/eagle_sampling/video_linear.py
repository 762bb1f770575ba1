"""Decoding through libavformat from the front: for containers we can't index, and the reference that the fast path falls back to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import av

from .limits import MediaError


def decode_linear(path: str, wanted: set[int], check: Callable[[], None]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(ticks, frame) for every presentation tick in `wanted`, as a plain decode of the whole file gives them; stops after the last one.

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
