"""libav's containers and decoders as this package uses them, the same with every release of PyAV that it admits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
from av.container import InputContainer

from ..files import open_stream

# PyAV 18 raises UnicodeDecodeError for tags that are not UTF-8 without this argument. PyAV 19 gives them with surrogate characters,
# and has no such argument.
_TAGS: dict[str, Any] = {"metadata_errors": "surrogateescape"} if int(av.__version__.partition(".")[0]) < 19 else {}


def open_container(path: str) -> InputContainer:
    """The file opened by libavformat, by its absolute path: "12:30.avi" would be read as a protocol.

    Bytes of its tags that are not UTF-8 are surrogate characters. Raises av.FFmpegError and OSError.
    """
    source = open_stream(path)
    return av.open(os.path.abspath(path) if source is path else source, **_TAGS)


@contextmanager
def at_rest(context: av.VideoCodecContext) -> Iterator[av.VideoCodecContext]:
    """The decoder, none of whose threads is left at work.

    libav waits for its threads when a decoder is freed, which Python does under its lock. Where PyAV's logging is on, as
    `av.logging.set_level` turns it on for the process, a thread that reports damage waits for that lock: both wait for ever.
    """
    try:
        yield context
    finally:
        context.flush_buffers()
