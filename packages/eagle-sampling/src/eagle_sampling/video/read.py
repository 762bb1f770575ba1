"""Exact frames by presentation time, decoded into one array.

Three steps: the index (presentation times and byte positions from the container's header), the samples that each wanted frame depends on,
and workers that decode only those. Memory is the output, one decoder per worker, and a window of encoded bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..choose import TIME_EPSILON
from ..limits import DEFAULT_LIMITS, FrameError, Limits, MediaError, checked_out, path_text, whole_number
from .beginning import sample_start
from .containers.demux import read_packets
from .containers.matroska_parts import Part
from .containers.source import Source
from .containers.track import Track, Unsupported
from .containers.webp import paint_webp
from .decode import Decoder, FileReader, Painter
from .dependencies import Group, correct_keyframes, group_targets
from .keyframes import start_test
from .probe import read_parts, read_track
from .sequential import PacketStream, decode_linear


@dataclass(frozen=True)
class Frames:
    """pixels: uint8 [n, h, w, 3] RGB; times: float64 [n], the true presentation times; errors: frames skipped under on_error="skip";
    concealed: frames of `pixels` that are damaged and were made up by the decoder, under on_damage="conceal"."""

    pixels: NDArray[np.uint8]
    times: NDArray[np.float64]
    errors: tuple[FrameError, ...] = ()
    concealed: tuple[FrameError, ...] = ()


def read_frames(
    path: str | os.PathLike[str],
    times: ArrayLike,
    size: int | tuple[int, int] | None = None,
    *,
    workers: int = 1,
    tolerance: float = 0.0,
    on_error: Literal["raise", "skip"] = "raise",
    on_damage: Literal["refuse", "conceal"] = "refuse",
    timeout: float | None = None,
    out: NDArray[np.uint8] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Frames:
    """The frames on the screen at `times`, in that order: for each time the last frame that appears at or before it.

    Args:
        path: a video file.
        times: float [n], seconds on the file's own timeline, as `probe` gives them; any order, repeats allowed. `choose_times` chooses
            them. A time before the first frame or after the end of the last one is an error of that frame.
        size: side of a square, or (width, height), to which frames are resized (bicubic, in one step with the conversion to RGB).
            None: the displayed size. Rotation is applied.
        workers: decoders in parallel threads; work is split by its cost. Workers beyond the number of keyframes to begin at become
            frame threads of the decoders.
        tolerance: seconds by which a keyframe may replace a wanted frame; `Frames.times` are those of the frames returned.
        on_error: "raise" a MediaError that names the file and the time, or "skip" frames that cannot be read and list them in `errors`.
        on_damage: "refuse" frames whose data, or data that they depend on, are damaged: they are errors. "conceal": of these frames, the
            picture that players show is used (libav's concealment), and each is listed in `Frames.concealed`.
        timeout: seconds for the whole call. A decoder that hangs inside libav stays in its thread, and the call fails.
        out: uint8 [n, h, w, 3] to write to, for example in shared memory; after a skip its first rows hold the frames that were read.

    Raises:
        MediaError: the file or a frame cannot be read, the time is up, or a limit is exceeded.
        ValueError: `times` is a number or not of numbers, `out` has another shape or dtype or is read-only, or an argument is out of range.
        TypeError: `path` is not a path, or `workers` or `size` is not of whole numbers.
    """
    name = path_text(path, "the path of a video file")
    given = np.asarray(times)
    if given.size and given.dtype.kind not in "iufO":
        raise ValueError(f"{name}: times are {given.dtype}, for example {given.flat[0]!r}: need seconds as numbers")
    requested = given.astype(np.float64)
    if requested.ndim != 1:
        given = f"the number {times}" if requested.ndim == 0 else f"an array of shape {requested.shape}"
        raise ValueError(
            f"{name}: times must be a list of seconds, not {given}; for a number of frames, choose their times first: "
            "read_frames(path, choose_times(probe(path), count))"
        )
    if on_damage not in ("refuse", "conceal"):
        raise ValueError(f"on_damage must be 'refuse' or 'conceal', not {on_damage!r}")
    workers = whole_number("workers", workers)
    in_time = timeout is None or 0 < timeout < threading.TIMEOUT_MAX
    if workers < 1 or not tolerance >= 0 or on_error not in ("raise", "skip") or not in_time:
        raise ValueError(
            f"workers = {workers}, tolerance = {tolerance}, on_error = {on_error!r}, timeout = {timeout}: need workers >= 1, "
            f"tolerance >= 0, on_error 'raise' or 'skip', timeout None or above 0 and below {threading.TIMEOUT_MAX:.2g}"
        )
    watch = _Watch(name, timeout)
    parts = read_parts(name, requested, tolerance, limits)
    if parts is not None:
        read = _from_parts(name, parts, requested, size, tolerance, workers, watch, limits, out)
        if read is not None:
            return read
    track = read_track(name, limits=limits, deadline=watch.deadline)
    samples, errors = _find(track, requested, tolerance)
    out = _output(name, track, len(requested), size, limits, out)
    places = _places(samples)
    failures: dict[int, str] = {}
    made_up: dict[int, str] = {}
    conceal = on_damage == "conceal"
    if places:
        try:
            failures, made_up = _decode(name, track, places, out, workers, watch, limits, conceal)
        except Unsupported:  # a transport stream that turns out to be irregular inside
            track = dataclasses.replace(read_packets(name, limits, watch.deadline), rotation=track.rotation, mirrored=track.mirrored)
            samples, errors = _find(track, requested, tolerance)
            places = _places(samples)
            failures, made_up = _decode(name, track, places, out, 1, watch, limits, conceal)
    for sample, reason in failures.items():
        errors += [FrameError(i, float(requested[i]), reason) for i in places[sample]]
    concealed = [FrameError(i, float(requested[i]), reason) for sample, reason in made_up.items() for i in places[sample]]
    frames = _result(name, track, requested, samples, out, sorted(errors, key=lambda error: error.index), on_error)
    return dataclasses.replace(frames, concealed=tuple(sorted(concealed, key=lambda error: error.index)))


def _from_parts(
    name: str,
    parts: list[Part],
    requested: NDArray[np.float64],
    size: int | tuple[int, int] | None,
    tolerance: float,
    workers: int,
    watch: _Watch,
    limits: Limits,
    out: NDArray[np.uint8] | None,
) -> Frames | None:
    """The frames by the parts of a file that hold them; None when one can't be read, so that the whole file has to tell why."""
    out = _output(name, parts[0].track, len(requested), size, limits, out)
    times = np.empty(len(requested))
    for part in parts:
        if (
            requested[part.wanted].max() > part.track.seconds(part.track.presentation_order()[-1:])[0]
        ):  # the file's end is known by all of it
            return None
        samples, errors = _find(part.track, requested[part.wanted], tolerance)
        if errors:
            return None
        places = {sample: part.wanted[rows].tolist() for sample, rows in _places(samples).items()}
        failures, made_up = _decode(name, part.track, places, out, workers, watch, limits, False)
        if failures or made_up:
            return None
        times[part.wanted] = part.track.seconds(samples)
    return Frames(out, times)


class _Watch:
    """The deadline of a call, and a flag for its threads that the caller has stopped waiting."""

    def __init__(self, name: str, timeout: float | None):
        self.name, self.timeout = name, timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.stopped = False

    def check(self) -> None:
        if self.stopped or (self.deadline is not None and time.monotonic() > self.deadline):
            raise self.error()

    def error(self) -> MediaError:
        return MediaError(f"{self.name}: decoding took longer than the limit of {self.timeout} s")


def _find(track: Track, requested: NDArray[np.float64], tolerance: float) -> tuple[NDArray[np.int64], list[FrameError]]:
    """(sample on the screen at each time, -1 where there is none; the errors of those)."""
    order = track.presentation_order()
    seconds = track.seconds(order)
    last = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0
    end = seconds[-1] + max(last, (track.duration or 0.0) - (seconds[-1] - seconds[0]), TIME_EPSILON)
    bad = ~((requested >= seconds[0] - TIME_EPSILON) & (requested <= end + TIME_EPSILON))
    at = np.clip(np.searchsorted(seconds, requested + TIME_EPSILON, side="right") - 1, 0, None)
    samples = order[at]
    keys = order[track.sync[order]]
    if tolerance > 0 and len(keys):  # an edit list may hide every keyframe
        key_seconds = track.seconds(keys)
        right = np.clip(np.searchsorted(key_seconds, requested), 0, len(keys) - 1)
        left = np.maximum(right - 1, 0)
        near = np.where(np.abs(key_seconds[left] - requested) <= np.abs(key_seconds[right] - requested), left, right)
        samples = np.where(np.abs(key_seconds[near] - requested) <= tolerance, keys[near], samples)
    reason = f"the video shows frames from {seconds[0]:.6f} to {end:.6f} s"
    errors = [FrameError(int(i), float(requested[i]), reason) for i in np.flatnonzero(bad)]
    return np.where(bad, -1, samples), errors


def _output_size(track: Track, size: int | tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        return (track.height, track.width) if track.rotation in (90, 270) else (track.width, track.height)
    try:
        width, height = (size, size) if isinstance(size, int | np.integer) else size
        width, height = whole_number("width", width), whole_number("height", height)
    except (TypeError, ValueError) as error:
        raise type(error)(f"size must be the side of a square or (width, height) in whole pixels, not {size!r}") from None
    if width < 1 or height < 1:
        raise ValueError(f"size must be positive, not {size}")
    return width, height


def _output(
    name: str, track: Track, count: int, size: int | tuple[int, int] | None, limits: Limits, out: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    """`out`, or a new array, of the shape that the frames need."""
    width, height = _output_size(track, size)
    limits.check_size(width, height, name)
    limits.check_size(track.width, track.height, name)
    shape = (count, height, width, 3)
    if out is None:
        return np.empty(shape, np.uint8)
    return checked_out(out, shape)


def _places(samples: NDArray[np.int64]) -> dict[int, list[int]]:
    """Sample -> the rows of the output that show it."""
    places: dict[int, list[int]] = {}
    for i, sample in enumerate(samples.tolist()):
        if sample >= 0:
            places.setdefault(sample, []).append(i)
    return places


def _decode(
    name: str,
    track: Track,
    places: dict[int, list[int]],
    out: NDArray[np.uint8],
    workers: int,
    watch: _Watch,
    limits: Limits,
    conceal: bool,
) -> tuple[dict[int, str], dict[int, str]]:
    """Decode what `places` needs into `out`; returns sample -> reason for what failed, and for what was concealed."""
    failures: dict[int, str] = {}
    concealed: dict[int, str] = {}
    problems: list[BaseException] = []
    painter = functools.partial(Painter, out, track.rotation, track.mirrored, lambda: watch.stopped)
    if track.container == "webp":
        _in_threads([lambda: failures.update(_from_webp(name, places, painter(), watch))], watch, problems)
        return failures, concealed
    if not track.timed:

        def from_front() -> None:
            failed = _from_front(name, track, places, painter(), watch, workers)
            if failed and conceal:
                damaged = {sample: places[sample] for sample in failed}
                lost = _from_front(name, track, damaged, painter(), watch, workers, conceal=True)
                concealed.update((sample, reason) for sample, reason in failed.items() if sample not in lost)
                failed = lost
            failures.update(failed)

        _in_threads([from_front], watch, problems)
        return failures, concealed

    indexed = track.offsets is not None or track.scattered is not None
    wanted = np.fromiter(places, np.int64)
    test = start_test(track.codec, track.extradata) if indexed else None
    if test is not None:
        with Source(name) as source:
            correct_keyframes(track, wanted, lambda sample: sample_start(track, source, test, sample))
    groups = group_targets(track, wanted)
    count = min(workers, len(groups)) if indexed else 1
    todo: queue.SimpleQueue[Group] = queue.SimpleQueue()
    # Most expensive first: the last to finish are then cheap, and the workers end together. One worker goes from front to back.
    for group in sorted(groups, key=lambda group: -group.cost) if count > 1 else groups:
        todo.put(group)
    try:
        source = Source(name)

        def work() -> None:
            reader = FileReader(source, track, limits) if indexed else PacketStream(name)
            decoder = Decoder(reader, track, painter(), watch.check, max(1, workers // len(groups)), conceal=conceal)
            while not problems:
                try:
                    group = todo.get_nowait()
                except queue.Empty:
                    break
                decoder.run(group, places)
            failures.update(decoder.failures)
            concealed.update(decoder.concealed)

        _in_threads([work] * count, watch, problems)
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{name}: can't be read: {error.strerror or error}") from error
    return failures, concealed


def _in_threads(jobs: list[Callable[[], None]], watch: _Watch, problems: list[BaseException]) -> None:
    """Run the jobs in threads (a single one without a time limit in the calling thread) and raise the first problem."""
    if len(jobs) == 1 and watch.deadline is None:
        jobs[0]()
        return

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # handed to the caller's thread, which raises it
            problems.append(error)

    # Daemons: a thread that hangs in a decoder must not keep the process from ending.
    threads = [threading.Thread(target=guarded, args=(job,), daemon=True, name=f"decode {watch.name}") for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(None if watch.deadline is None else max(0.0, watch.deadline - time.monotonic()) + 0.05)
    if any(thread.is_alive() for thread in threads):
        watch.stopped = True
        raise watch.error()
    if problems:
        raise problems[0]


def _from_front(
    name: str, track: Track, places: dict[int, list[int]], painter: Painter, watch: _Watch, threads: int, *, conceal: bool = False
) -> dict[int, str]:
    """Decode from the front, for packets that do not state which frame they hold."""
    failed, reason = decode_linear(
        name, track, set(places), lambda frame, i: painter.paint(frame, places[i]), watch.check, threads, conceal=conceal
    )
    return dict.fromkeys(failed, reason)


def _from_webp(name: str, places: dict[int, list[int]], painter: Painter, watch: _Watch) -> dict[int, str]:
    return paint_webp(name, set(places), lambda frame, i: painter.paint(frame, places[i]), watch.check)


def _result(
    name: str,
    track: Track,
    requested: NDArray[np.float64],
    samples: NDArray[np.int64],
    out: NDArray[np.uint8],
    errors: list[FrameError],
    on_error: str,
) -> Frames:
    if not errors:
        return Frames(out, track.seconds(samples))
    if on_error == "raise":
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise MediaError(f"{name}: the frame at {errors[0].time:.3f} s can't be read: {errors[0].reason}{more}")
    keep = np.setdiff1d(np.arange(len(requested)), [error.index for error in errors])
    for row, i in enumerate(keep.tolist()):  # close the gaps in place: the output is the largest thing here
        if row != i:
            out[row] = out[i]
    return Frames(out[: len(keep)], track.seconds(samples[keep]), tuple(errors))
