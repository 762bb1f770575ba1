"""Chapters of a video: from one file for many videos, a file next to the video, or the container."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eagle_sampling.video.libav import open_container
from eagle_train.config import ConfigError


class Chapter(NamedTuple):
    """start, end: seconds from the first frame of the file; end None: until the next chapter or the end of the video."""

    start: float
    end: float | None
    title: str


class BadChapters(ConfigError):
    """A file that does not hold chapters, or times that can't be those of chapters. Names the file and the entry."""


def load_chapters(path: Path) -> dict[str, list[Chapter]]:
    """Chapters by the video's name: its path, file name, or file name without suffix.

    Layouts: ViTT, `{"id", "annotations": [{"timestamp": milliseconds, "tag"}]}`, as a list or one object per line (of several annotations
    of one video the first is taken); VidChapters, `{id: {"duration", "timestamps": [[start, end]], "sentences": [title]}}`; ours,
    `{name: [{"start", "end" (optional), "title"}]}`. Raises BadChapters.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadChapters(f"{path}: can't be read as chapters: {error}") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    content.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise BadChapters(f"{path}:{number}: is not JSON: {error.msg}") from error
    if isinstance(content, Mapping) and "annotations" in content:
        content = [content]
    chapters: dict[str, list[Chapter]] = {}
    entries = content.items() if isinstance(content, Mapping) else ((_name(path, entry), entry) for entry in content)
    for name, entry in entries:
        chapters.setdefault(str(name), _chapters(entry, f"{path}: {name}"))
    return chapters


def of_video(video: str, known: Mapping[str, list[Chapter]]) -> list[Chapter]:
    """Chapters of one video, in order: from `known`, else `<video without suffix>.chapters.json`, else those that its container states.

    Raises BadChapters for that file.
    """
    path = Path(video)
    for name in (video, path.name, path.stem):
        if name in known:
            return sorted(known[name])
    sidecar = path.with_name(f"{path.stem}.chapters.json")
    if sidecar.is_file():
        try:
            content = json.loads(sidecar.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise BadChapters(f"{sidecar}: can't be read as chapters: {error}") from error
        return sorted(_chapters(content, str(sidecar)))
    with open_container(video) as container:
        found = []
        for chapter in container.chapters():
            base = float(chapter["time_base"] or 0)
            title = str(chapter["metadata"].get("title") or "")
            readable = title.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            found.append(Chapter(max(chapter["start"] * base, 0.0), chapter["end"] * base, readable))
    return sorted(found)


def _name(path: Path, entry: Any) -> str:
    name = entry.get("id", entry.get("video")) if isinstance(entry, Mapping) else None
    if not isinstance(name, str):
        raise BadChapters(f"{path}: an entry has no 'id' or 'video' that names its video: {str(entry)[:100]}")
    return name


def _chapters(entry: Any, where: str) -> list[Chapter]:
    try:
        if isinstance(entry, Mapping) and "annotations" in entry:
            return [_chapter(item["timestamp"], None, item["tag"], unit=1000) for item in entry["annotations"]]
        if isinstance(entry, Mapping) and "timestamps" in entry:
            titles = entry.get("sentences", entry.get("titles"))
            if not isinstance(titles, list) or len(titles) != len(entry["timestamps"]):
                raise ValueError("as many sentences as timestamps are expected")
            return [_chapter(start, end, title) for (start, end), title in zip(entry["timestamps"], titles)]
        items = entry["chapters"] if isinstance(entry, Mapping) else entry
        return [_chapter(item["start"], item.get("end"), item["title"]) for item in items]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        expected = "annotations (ViTT), timestamps and sentences (VidChapters), or a list of {start, title}"
        raise BadChapters(f"{where}: not chapters ({type(error).__name__}: {error}); expected {expected}") from error


def _chapter(start: Any, end: Any, title: Any, unit: float = 1) -> Chapter:
    """unit: a second, in that of the times. What is not Unicode in a title is replaced. Raises TypeError and ValueError."""
    if not isinstance(title, str):
        raise TypeError(f"the title {title!r} is not a text")
    if isinstance(start, bool) or isinstance(end, bool):
        raise TypeError("a time is true or false")
    first, last = float(start) / unit, None if end is None else float(end) / unit
    if not (math.isfinite(first) and first >= 0) or (last is not None and not (math.isfinite(last) and last >= first)):
        raise ValueError(f"start {start} and end {end} are not rising times of the video")
    return Chapter(first, last, title.encode("utf-8", "replace").decode())
