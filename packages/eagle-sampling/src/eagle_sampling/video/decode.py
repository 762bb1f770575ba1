"""Decoding by one worker: groups of samples in, wanted frames out, each converted and resized once into its place of the output.

A worker has its own decoder; libav releases the interpreter's lock while it works, so workers run in parallel threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from ..limits import Limits
from .av1 import join, needed_parts
from .beginning import DECODERS, DEFERRED, packet_of
from .containers.demux import choose_stream
from .containers.source import Source
from .containers.track import Track
from .dependencies import Group, droppable_test, earlier_start
from .keyframes import Start, start_test
from .libav import at_rest, open_container

_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


class Painter:
    """Converts a decoded frame to RGB at the output's size, turns it upright, and writes it to `out[i]` for the wanted places.

    out: uint8 [n, h, w, 3].
    """

    def __init__(self, out: NDArray[np.uint8], rotation: int, mirrored: bool, stopped: Callable[[], bool]):
        self.out, self.rotation, self.mirrored, self.stopped = out, rotation, mirrored, stopped
        height, width = out.shape[1:3]
        self.size = (height, width) if rotation in (90, 270) else (width, height)
        self.resize, self.pack = VideoReformatter(), VideoReformatter()

    def paint(self, frame: av.VideoFrame, places: list[int]) -> None:
        width, height = self.size
        if (frame.width, frame.height) == (width, height):
            # The unscaled planar conversion leaves the last columns unwritten when the width isn't a multiple of 16 (libswscale 9.5).
            rgb = self.resize.reformat(frame, width, height, "rgb24", interpolation=_ACCURATE, threads=1)
        else:
            # swscale's planar RGB interpolates chroma fully and rounds exactly; its packed rgb24 does neither by default (mean error
            # 2.1 of 255) and takes 1.7x as long, packing included (640x360 to 448x448).
            planar = self.resize.reformat(frame, width, height, "gbrp", interpolation=Interpolation.BICUBIC, threads=1)
            rgb = self.pack.reformat(planar, width, height, "rgb24", threads=1)
        plane = rgb.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)  # type: ignore[arg-type]
        pixels = rows[:height, : 3 * width].reshape(height, width, 3)
        if self.mirrored:
            pixels = pixels[:, ::-1]
        if self.rotation:
            pixels = np.rot90(pixels, -self.rotation // 90)
        if self.stopped():  # the caller has stopped waiting and may have reused the array
            return
        for place in places:
            self.out[place] = pixels


class PacketReader(Protocol):
    """Returns encoded frames by sample number; when `tolerant`, also those that the container marks as damaged."""

    context: av.VideoCodecContext
    tolerant: bool

    def begin(self, start: int, stop: int, wanted: set[int]) -> None:
        """Begin a pass over samples start ... stop - 1 for the pictures of `wanted`."""
        ...

    def packet(self, sample: int, stop: int, wanted: bool) -> av.Packet | None:
        """Sample `sample` of a pass that ends before `stop`, with its number as `pts`; None when nothing wanted depends on it."""
        ...


class FileReader:
    """Packets read at the offsets of the index, in windows that hold many, with a decoder created here."""

    tolerant = False

    def __init__(self, source: Source, track: Track, limits: Limits):
        self.source, self.track, self.limits = source, track, limits
        self.droppable = droppable_test(track.codec, track.extradata)
        self.window_start, self.window = 0, b""
        self.parts: dict[int, list[tuple[int, int]]] | None = None  # what to decode of each sample, where the codec's headers state it
        self.container = open_container(source.path) if track.demuxed else None
        if self.container is not None:
            self.context = choose_stream(self.container).codec_context
            return
        context = av.CodecContext.create(DECODERS.get(track.codec, track.codec), "r")
        assert isinstance(context, av.VideoCodecContext)
        if track.extradata:
            context.extradata = track.extradata
        self.context = context

    def begin(self, start: int, stop: int, wanted: set[int]) -> None:
        self.parts = None
        if self.track.codec == "av1" and 2 * len(wanted) < stop - start:  # reading the headers costs 56 us a sample
            self.parts = needed_parts(lambda sample: self._read(sample, stop), range(start, stop), wanted, self.track.extradata)

    def packet(self, sample: int, stop: int, wanted: bool) -> av.Packet | None:
        if self.parts is not None and sample not in self.parts:
            return None
        data = self._read(sample, stop)
        if not wanted and self.droppable is not None and self.droppable(data):
            return None
        if self.parts is not None:
            data = join(data, self.parts[sample])
        packet = packet_of(data)
        packet.pts = sample
        return packet

    def _read(self, sample: int, stop: int) -> bytes:
        track = self.track
        if track.scattered is not None:
            return track.scattered(self.source, sample)
        assert track.offsets is not None
        assert track.sizes is not None
        offset, size = int(track.offsets[sample]), int(track.sizes[sample])
        at = offset - self.window_start
        if at < 0 or at + size > len(self.window):
            self.limits.check_bytes(size, f"{self.source.path}: the video packet at byte {offset}")
            end = int(track.offsets[stop - 1] + track.sizes[stop - 1])
            self.window_start, at = offset, 0
            self.window = self.source.read(offset, max(size, min(self.source.window, end - offset)))
        return self.window[at : at + size]


class Decoder:
    """Decodes groups. `failures` maps a sample to the reason why its frame could not be read.

    conceal: of damaged frames the picture that the decoder makes up is used; `concealed` maps these samples to the reason.
    """

    def __init__(
        self, reader: PacketReader, track: Track, painter: Painter, check: Callable[[], None], threads: int = 1, *, conceal: bool = False
    ):
        self.reader, self.track, self.painter, self.check, self.conceal = reader, track, painter, check, conceal
        self.failures: dict[int, str] = {}
        self.concealed: dict[int, str] = {}
        self.orderly = len(track.presentation_ticks()) == (len(track.ticks) if track.shown is None else np.count_nonzero(track.shown))
        # H.264 may begin at a P-frame (periodic intra refresh) and reports a missing reference; older codecs use a grey picture instead.
        self.reports_types = track.codec != "h264"
        self.test = start_test("h264", track.extradata) if track.codec == "h264" else None
        context = reader.context
        # explode: report damage instead of painting over it. strict: assume the deepest reordering where the stream states none.
        context.options = {"err_detect": "explode", **({"strict": "1"} if track.codec == "h264" else {}), **track.colour}
        context.thread_count = threads
        context.thread_type = "FRAME" if threads > 1 else "NONE"

    def run(self, group: Group, places: dict[int, list[int]]) -> None:
        """Paint the group's targets to `places[sample]`, or note why not."""
        left = set(group.targets)
        start: int | None = group.start
        reason = None
        for attempt in range(4):
            with at_rest(self.reader.context):
                reason = self._decode(start, max(left) + 1, left, places)
            # An apparent damage may be a reference to before an open GOP's keyframe: decoding from one keyframe earlier decides.
            start = earlier_start(self.track, start, attempt) if left and (reason is None or attempt == 0) else None
            if start is None:
                break
        reason = reason or "the decoder gives no frame of that time"
        if left and self.conceal:
            self._conceal(group.start, left, places, reason)
        for sample in left:
            self.failures[sample] = reason

    def _conceal(self, start: int, left: set[int], places: dict[int, list[int]], reason: str) -> None:
        """One pass by a decoder that paints over damage, up to the last sample of `left`; removes those for which it gives a picture."""
        context = av.CodecContext.create(self.reader.context.codec, "r")
        assert isinstance(context, av.VideoCodecContext)
        if self.reader.context.extradata:
            context.extradata = self.reader.context.extradata
        context.options = dict(self.track.colour)
        context.thread_count, context.thread_type = 1, "NONE"
        stop = max(left) + 1
        self.reader.tolerant = True
        self.reader.begin(start, stop, left)

        def decode(packet: av.Packet | None) -> None:
            try:
                frames = context.decode(packet)
            except av.FFmpegError:  # as players do: continue with the next packet
                return
            for frame in frames:
                if frame.pts in left:
                    left.remove(frame.pts)
                    self.painter.paint(frame, places[frame.pts])
                    self.concealed[frame.pts] = reason

        for sample in range(start, stop):
            self.check()
            try:
                packet = self.reader.packet(sample, stop, True)
            except av.FFmpegError:  # the file ends before it
                break
            if packet is not None:
                decode(packet)
        decode(None)
        self.reader.tolerant = False

    def _decode(self, start: int, stop: int, left: set[int], places: dict[int, list[int]]) -> str | None:
        """One pass over samples start ... stop - 1; removes the frames it reads from `left`. Returns a reason when the data are damaged."""
        ticks = self.track.ticks[start:stop].tolist()
        waiting = set(left)
        painted: list[int] = []
        damaged = stop  # the first sample whose picture is incomplete; what is decoded after it may refer to it
        is_keyframe = True  # `start`, as far as is known
        read, context = self.reader.packet, self.reader.context

        def take(frame: av.VideoFrame) -> None:
            nonlocal damaged, is_keyframe
            sample = frame.pts  # the number of its packet
            if sample is None:
                return
            if frame.is_corrupt:
                damaged = min(damaged, sample)
            else:
                whole.add(sample)
            if (
                start
                and self.reports_types
                and sample == start
                and not frame.key_frame
                and frame.pict_type in (PictureType.P, PictureType.B)
            ):
                is_keyframe = False
            if sample in waiting and sample < damaged:
                waiting.remove(sample)
                self.painter.paint(frame, places[sample])
                painted.append(sample)

        sent, reason, deferred = start, None, ""
        # After an I-frame that is not an IDR frame, H.264 streams may mark pictures from before it, which is an error of the command only:
        # all pictures come out whole. Those with damaged slices do not come out, or are marked as corrupt (300 random bit flips).
        tolerant = False
        whole: set[int] = set()
        given: set[int] = set()
        try:
            self.reader.begin(start, stop, left)
            for sample in range(start, stop):
                tick = ticks[sample - start]
                wanted = sample in left
                if tick < ticks[0] and not wanted and self.orderly:
                    continue  # a leading picture of an open GOP: it refers to frames before `start`, and no wanted frame refers to it
                sent = sample
                packet = read(sample, stop, wanted)
                if packet is None:
                    continue
                self.check()
                if sample == start and self.test is not None:
                    tolerant = self.test(bytes(packet)) is Start.OPEN
                given.add(sample)
                try:
                    frames = context.decode(packet)
                except av.FFmpegError as error:
                    if not tolerant or sample > start + DEFERRED:
                        raise
                    deferred = deferred or error.strerror or str(error)
                    continue
                for frame in frames:
                    take(frame)
        except av.FFmpegError as error:
            damaged, reason = min(damaged, sent), error.strerror or str(error)
        try:
            for frame in context.decode(None):
                take(frame)
        except av.FFmpegError as error:
            reason = reason or error.strerror or str(error)
        if deferred and given != whole:
            damaged, reason = min(damaged, *(given - whole)), reason or deferred
        if not is_keyframe:
            return None
        left.difference_update(sample for sample in painted if sample < damaged)
        if damaged == stop and reason is None:
            return None
        at = float(self.track.seconds(np.array([min(damaged, stop - 1)]))[0])
        return f"the data of the frame at {at:.3f} s are damaged ({reason or 'the picture is incomplete'})"
