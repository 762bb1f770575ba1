"""Step 1, split: videos into clips. A clip is a row with `start` and `end`; nothing is encoded again."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eagle_sampling import MediaError, VideoInfo, probe
from eagle_train.config import ConfigError
from eagle_train.data.ledger import Entry
from eagle_train.data.media import VIDEO_SUFFIXES, video_files
from eagle_train.executors import cpus, map_items

from .chapters import BadChapters, Chapter, load_chapters, of_video
from .folder import Folder, Part, digest, entry, key_of, read_part, write_part
from .frames import NoTimes, small_frames, times_of_frames
from .settings import SET_ONE_WORKER, CurateConfig, SplitConfig
from .shots import HEIGHT, WIDTH, shot_boundaries

VERSION = 3
"""Of the shot detection and the schema: part of the key of every part."""

SCHEMA = pa.schema(
    [
        ("clip", pa.string()),  # <video name>@<start>-<end>, unique
        ("video", pa.string()),  # absolute path
        ("content", pa.string()),  # hash of the file
        ("source", pa.string()),  # name of the folder that holds the video
        ("start", pa.float64()),  # seconds from the first frame
        ("end", pa.float64()),
        ("begins", pa.string()),  # start, cut, gradual, fixed, chapter: what its first frame is
        ("title", pa.string()),  # of the chapter, or null
        ("video_seconds", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


class Work(NamedTuple):
    """One video. line: its place in the list of videos, 1-based; known: its chapters from the configuration's file."""

    name: str
    line: int
    part: Path
    settings: SplitConfig
    known: list[Chapter] | None
    threads: int


def split(config: CurateConfig, *, progress: Callable[[int, int], None] | None = None) -> pa.Table:
    """Split all videos of a curation; returns the clips, and writes `split.parquet` and the ledger."""
    folder = Folder(config.folder)
    videos = list_videos(config.videos)
    chapters = load_chapters(config.chapters) if config.chapters is not None and config.split.method == "chapters" else {}
    works: list[Work] = []
    missing: list[Entry] = []
    workers = config.workers or cpus()
    threads = max(1, workers // len(videos)) if config.executor == "local" else 1
    for line, video in enumerate(videos, start=1):
        if (written := video.encode("utf-8", "backslashreplace").decode()) != video:
            missing.append(entry("split", written, line, "bad-name", f"{written}: its name is not UTF-8, so that no row can name it"))
            continue
        try:
            stat = os.stat(video)
        except OSError as error:
            missing.append(entry("split", video, line, "bad-video", f"{video}: can't be read: {error.strerror or error}"))
            continue
        known = next((chapters[name] for name in (video, Path(video).name, Path(video).stem) if name in chapters), None)
        sidecar = _stamp(Path(video).with_name(f"{Path(video).stem}.chapters.json")) if config.split.method == "chapters" else None
        key = key_of(VERSION, video, stat.st_size, stat.st_mtime_ns, config.split.model_dump(mode="json"), known, sidecar)
        works.append(Work(video, line, folder.part("split", key), config.split, known, threads))
    todo = [work for work in works if read_part(work.part) is None]
    done = len(videos) - len(todo)
    if progress is not None:
        progress(done, len(videos))
    processes = config.workers if config.executor == "ray" else workers
    for _ in map_items(run, todo, workers=processes, executor=config.executor, name=lambda work: work.name, advice=SET_ONE_WORKER):
        done += 1
        if progress is not None:
            progress(done, len(videos))
    parts: list[Part] = []
    seen: dict[str, str] = {}
    for work in works:
        part = read_part(work.part)
        assert part is not None
        if part.table.num_rows and (first := seen.setdefault(part.table["content"][0].as_py(), work.name)) != work.name:
            part = Part(
                SCHEMA.empty_table(), [entry("split", work.name, work.line, "same-file", f"{work.name}: has the content of {first}")]
            )
        # The place in the list is that of this run: the part may have been made when the list was another.
        parts.append(Part(part.table, [entry("split", item.source, work.line, item.reason, item.detail) for item in part.entries]))
    return folder.finish("split", parts, SCHEMA, missing)


def list_videos(patterns: list[str]) -> list[str]:
    """Absolute paths of all videos, sorted, each once. Raises ConfigError for a pattern or folder without any."""
    found: set[str] = set()
    for pattern in patterns:
        if os.path.isdir(pattern):
            new = {str(path) for path in video_files(Path(pattern))}
        elif os.path.exists(pattern) or not glob.has_magic(pattern):
            new = {pattern}  # a file that is missing goes to the ledger
        else:
            new = {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
        if not new:
            raise ConfigError(f"videos: {pattern} has no video files ({', '.join(sorted(VIDEO_SUFFIXES))}); check the path")
        found |= {os.path.abspath(path) for path in new}
    return sorted(found)


def run(work: Work) -> None:
    """Split one video and write its part."""
    write_part(work.part, split_video(work.name, work.line, work.settings, known=work.known, threads=work.threads))


def split_video(video: str, line: int, settings: SplitConfig, *, known: list[Chapter] | None = None, threads: int = 1) -> Part:
    """The clips of one video, and what was left out. Never raises for what the file is: that is an entry of the ledger."""
    try:
        content = digest(video)
        info = probe(video)
        if info.frame_count == 1 and not info.duration:
            raise NoTimes(f"{video}: has one frame and no duration: it is a picture")
        if info.times is None or not info.duration:
            raise NoTimes(f"{video}: the times of its frames are not known; put the stream into an MP4 or Matroska file first")
        segments = list(METHODS[settings.method](video, info, settings, known, threads))
    except NoTimes as error:
        return Part(SCHEMA.empty_table(), [entry("split", video, line, "no-times", str(error))])
    except BadChapters as error:
        return Part(SCHEMA.empty_table(), [entry("split", video, line, "bad-chapters", str(error))])
    except (MediaError, OSError) as error:
        return Part(SCHEMA.empty_table(), [entry("split", video, line, "bad-video", str(error))])
    rows: list[dict[str, Any]] = []
    entries: list[Entry] = []
    if not segments:
        entries.append(entry("split", video, line, "no-chapters", f"{video}: has no chapters; use another split.method, or give chapters:"))
    for start, end, begins, title in _limited(segments, settings.max_seconds):
        if end - start < settings.min_seconds:
            reason = f"{start:.3f}-{end:.3f} s is shorter than split.min_seconds = {settings.min_seconds}"
            entries.append(entry("split", video, line, "too-short", reason))
            continue
        rows.append(
            {
                "clip": f"{Path(video).name}-{content[:8]}@{start:.3f}-{end:.3f}",
                "video": video,
                "content": content,
                "source": Path(video).parent.name,
                "start": start,
                "end": end,
                "begins": begins,
                "title": title,
                "video_seconds": info.duration,
                "width": info.width,
                "height": info.height,
            }
        )
    return Part(pa.Table.from_pylist(rows, schema=SCHEMA), entries)


Segment = tuple[float, float, str, str | None]
"""start, end, what its first frame is, title."""


def _shots(video: str, info: VideoInfo, settings: SplitConfig, known: list[Chapter] | None, threads: int) -> Iterator[Segment]:
    times: list[NDArray[np.float64]] = []

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for pixels, seconds in small_frames(video, WIDTH, HEIGHT, threads=threads):
            times.append(seconds)
            yield pixels

    _, boundaries = shot_boundaries(chunks())
    at = times_of_frames(times, _table(info), video)
    return _between([0.0, *(float(at[b.frame]) for b in boundaries)], ["cut" if b.span <= 3 else "gradual" for b in boundaries], info)


def _transnetv2(video: str, info: VideoInfo, settings: SplitConfig, known: list[Chapter] | None, threads: int) -> Iterator[Segment]:
    from .transnetv2 import boundaries

    pixels, times = [], []
    for chunk, seconds in small_frames(video, WIDTH, HEIGHT, colour="rgb", threads=threads):
        pixels.append(chunk)
        times.append(seconds)
    at = times_of_frames(times, _table(info), video)
    frames = boundaries(np.concatenate(pixels), settings.threshold)
    return _between([0.0, *(float(at[frame]) for frame in frames)], ["cut"] * len(frames), info)


def _fixed(video: str, info: VideoInfo, settings: SplitConfig, known: list[Chapter] | None, threads: int) -> Iterator[Segment]:
    count = max(int(np.ceil((info.duration or 0.0) / settings.seconds - 1e-6)), 1)
    starts = [index * settings.seconds for index in range(count)]
    return _between(starts, ["fixed"] * (count - 1), info)


def _chapters(video: str, info: VideoInfo, settings: SplitConfig, known: list[Chapter] | None, threads: int) -> Iterator[Segment]:
    duration = info.duration or 0.0
    found = sorted(known) if known is not None else of_video(video, {})
    for index, chapter in enumerate(found):
        after = found[index + 1].start if index + 1 < len(found) else duration
        end = min(duration, after if chapter.end is None else chapter.end)
        yield chapter.start, max(end, chapter.start), "chapter", chapter.title


METHODS = {"shots": _shots, "fixed": _fixed, "chapters": _chapters, "transnetv2": _transnetv2}


def _table(info: VideoInfo) -> NDArray[np.float64]:
    return np.empty(0) if info.times is None else info.times.times()


def _between(starts: list[float], begins: list[str], info: VideoInfo) -> Iterator[Segment]:
    for start, end, kind in zip(starts, [*starts[1:], info.duration or 0.0], ["start", *begins]):
        yield start, end, kind, None


def _limited(segments: list[Segment], longest: float | None) -> Iterator[Segment]:
    for start, end, begins, title in segments:
        parts = 1 if longest is None else max(int(np.ceil((end - start) / longest - 1e-6)), 1)
        edges = [start + (end - start) * index / parts for index in range(parts)] + [end]
        for index in range(parts):
            yield edges[index], edges[index + 1], begins if index == 0 else "fixed", title


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
