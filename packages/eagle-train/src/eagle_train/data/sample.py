"""Rows in, samples out: every accepted spelling of a conversation with media becomes one `Sample`.

Media are taken in the order in which they are written; placeholders in the text stay as they are (`eagle_model.prompt` resolves
them). A document is a video whose frames are its pages: `<document-N>` in the text counts on after the row's videos.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from eagle_model.visual import VideoRef
from eagle_train.errors import TrainError

ImageRef = str | dict[str, str]
"""An absolute path, or `{"lmdb_file": absolute path, "lmdb_key": key}`: what `eagle_sampling.open_image` takes."""

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "observation": "observation",
    "tool": "tool",
    "gpt": "assistant",
    "assistant": "assistant",
}
_KINDS = ("image", "video", "document")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://|data:[\w/+.-]*[;,]")
"""What is no file: `clip1:2.png` is one, `s3://...` and `data:image/png;base64,...` aren't."""
_LONGEST_PATH = 4096
"""Characters; Linux takes no longer path. What is longer is a picture in base64 that stands in a path's place."""


class RowError(TrainError, ValueError):
    """A row that can't be used: `reason` is a short fixed name to count by, `detail` says what exactly."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return RowError, (self.reason, self.detail)


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: `messages` (role, content with `<image-N>`/`<video-N>`), its media in order, and where it came from."""

    messages: list[dict[str, str]]
    images: tuple[ImageRef, ...]
    videos: tuple[VideoRef, ...]
    source: str
    line: int


class Address(NamedTuple):
    """Where a row stands, so that a process reads it without the facts: `size` bytes at `offset` of the file `annotation`.

    line: 1-based. root: folder that relative media paths start from. system: system message of rows that have none.
    """

    source: str
    line: int
    annotation: str
    offset: int
    size: int
    root: str
    system: str | None


def load_sample(address: Address) -> Sample:
    """Read and normalise the row; raises RowError or OSError when the file changed since prepare."""
    row = read_row(address.annotation, address.offset, address.size)
    return normalise(row, address.source, root=address.root, line=address.line, system=address.system)


def read_row(path: str | Path, offset: int, size: int) -> dict[str, Any]:
    """The JSON object that stands at `offset` (bytes) of an annotation file and is `size` bytes long; raises RowError."""
    with open(path, "rb") as file:
        file.seek(offset)
        return parse_row(file.read(size))


def parse_row(line: bytes) -> dict[str, Any]:
    """A line of JSONL as a dictionary; raises RowError("broken-json") otherwise."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise RowError("broken-json", f"{error}; the line starts with {line[:60]!r}") from error
    if not isinstance(row, dict):
        raise RowError("broken-json", f"the line is a {type(row).__name__}, expected an object")
    return row


def normalise(row: Mapping[str, Any], source: str, *, root: str | Path, line: int, system: str | None = None) -> Sample:
    """The one shape of a row.

    Args:
        row: the parsed line.
        source: name of the recipe's source.
        root: folder that relative media paths start from.
        line: 1-based line number, for messages.
        system: system message put first when the row has none; None adds nothing.

    Raises:
        RowError: with reason `bad-row` (shape), `no-assistant-turn`, `bad-media` (a reference that can't be understood).
    """
    media = _Media(Path(root))
    for entry in _as_list(row.get("data"), "data"):
        if not isinstance(entry, Mapping) or entry.get("type") not in _KINDS:
            raise RowError("bad-media", f"data: {_short(entry)} has no 'type' of {', '.join(_KINDS)}")
        kind = entry["type"]
        items = entry.get(f"{kind}_list", entry.get(kind))
        if items is None:
            raise RowError("bad-media", f"data: an entry of type {kind} has no '{kind}_list'")
        media.add(kind, items)
    for kind in _KINDS:
        for key in (kind, f"{kind}s", f"{kind}_list"):
            if row.get(key) is not None:
                media.add(kind, row[key])
    messages = _messages(row, media)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if media.documents:
        for message in messages:
            message["content"] = _number_documents(message["content"], len(media.videos))
    return Sample(messages, tuple(media.images), (*media.videos, *media.documents), source, line)


def _messages(row: Mapping[str, Any], media: "_Media") -> list[dict[str, str]]:
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise RowError("bad-row", f"no 'conversations' or 'messages'; keys are {', '.join(map(str, row)) or 'none'}")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise RowError("bad-row", f"turn {index + 1} is a {type(turn).__name__}, expected an object")
        name = turn.get("from", turn.get("role"))
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError("bad-row", f"turn {index + 1} is from {name!r}; known are {', '.join(_ROLES)}")
        if role == "system" and index:
            raise RowError("bad-row", f"turn {index + 1} is a system message; it may only come first")
        messages.append({"role": role, "content": _content(turn.get("value", turn.get("content")), index, media)})
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no-assistant-turn", f"{len(messages)} turns, none from the assistant: there is nothing to learn")
    roles = [message["role"] for message in messages]
    if "user" not in roles[: len(roles) - roles[::-1].index("assistant")]:
        raise RowError("bad-row", "no turn from the user before the assistant's last one: nothing is asked")
    return messages


def _content(value: Any, index: int, media: "_Media") -> str:
    if isinstance(value, str):
        return _text(value, index)
    if not isinstance(value, list):
        raise RowError("bad-row", f"the text of turn {index + 1} is a {type(value).__name__}, expected text")
    pieces = []
    for part in value:  # OpenAI's content parts: media stand where they are shown
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(_text(part["text"], index))
        elif kind in ("image", "image_url", "video", "video_url", "document"):
            name = kind.removesuffix("_url")
            item = part.get(kind, part.get("url"))
            if isinstance(item, Mapping) and "url" in item:
                item = item["url"]
            before = media.count(name)
            media.add(name, item)
            if media.count(name) == before:
                raise RowError("bad-media", f"turn {index + 1} has a part that shows no {name}: {_short(part)}")
            pieces.extend(f"<{name}-{number}>" for number in range(before + 1, media.count(name) + 1))
        else:
            raise RowError("bad-row", f"turn {index + 1} has a part {_short(part)}; known types are text, image, video, document")
    return "".join(pieces)


def _text(value: str, index: int) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError("bad-row", f"the text of turn {index + 1} has half of a surrogate pair: {error}") from error
    return value


class _Media:
    """Collects the references of one row, paths made absolute."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[ImageRef] = []
        self.videos: list[VideoRef] = []
        self.documents: list[VideoRef] = []

    def count(self, kind: str) -> int:
        return len({"image": self.images, "video": self.videos, "document": self.documents}[kind])

    def add(self, kind: str, items: Any) -> None:
        if kind == "document" and isinstance(items, list) and items and not any(map(_is_document, items)):
            items = [items]  # a flat list of page images is one document
        for item in items if isinstance(items, list) else [items]:
            if kind == "image":
                self.images.append(self.image(item))
            elif kind == "video":
                self.videos.append(self.video(item))
            else:
                self.documents.append(self.document(item))

    def path(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not value:
            raise RowError("bad-media", f"{what} is {_short(value)}, expected a path")
        if value.startswith("file://"):
            value = unquote(value.removeprefix("file://"))
        if _ADDRESS.match(value):
            raise RowError("bad-media", f"{what} {_short(value)} is an address; media are read from files, download it first")
        if len(value) > _LONGEST_PATH:
            raise RowError("bad-media", f"{what} {_short(value)} has {len(value)} characters and is no path; media are read from files")
        if "\0" in value:
            raise RowError("bad-media", f"{what} {_short(value)} has a zero byte")
        try:
            os.fsencode(value)
        except UnicodeEncodeError as error:  # half of a surrogate pair, but for those that Python spells odd bytes of a name with
            raise RowError("bad-media", f"{what} {_short(value)} can't be a path: {error}") from error
        return str(self.root / value)

    def image(self, item: Any) -> ImageRef:
        if isinstance(item, Mapping):
            if "lmdb_file" in item and "lmdb_key" in item:
                return {"lmdb_file": self.path(item["lmdb_file"], "lmdb_file"), "lmdb_key": str(item["lmdb_key"])}
            item = item.get("path", item.get("image", item))
        return self.path(item, "image")

    def video(self, item: Any) -> VideoRef:
        if not isinstance(item, Mapping):
            return VideoRef(self.path(item, "video"))
        start = _seconds(item, "start", "start_time")
        end = _seconds(item, "end", "end_time")
        if start is not None and end is not None and end <= start:
            raise RowError("bad-media", f"video clip ends at {end} s, not after its start at {start} s")
        return VideoRef(self.path(item.get("path", item.get("video")), "video"), start, end)

    def document(self, item: Any) -> VideoRef:
        if isinstance(item, Mapping) and "lmdb_file" not in item:
            item = item.get("pages", item.get("path", item.get("document", item)))
        if isinstance(item, list):
            if not item:
                raise RowError("bad-media", "a document has no pages")
            return VideoRef(frames=tuple(self.image(page) for page in item))
        if _is_pdf(item):
            return VideoRef(self.path(item, "document"))
        return VideoRef(frames=(self.image(item),))


def _is_document(item: Any) -> bool:
    """Whether an item of a list is a document by itself, and not a page of the one that the list is."""
    if isinstance(item, Mapping):
        return "pages" in item or "document" in item or _is_pdf(item.get("path"))
    return isinstance(item, list) or _is_pdf(item)


def _is_pdf(item: Any) -> bool:
    return isinstance(item, str) and item.lower().endswith(".pdf")


def _seconds(item: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        value = item.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise RowError("bad-media", f"video {name} is {_short(value)}, expected seconds from 0 on")
        return float(value)
    return None


def _number_documents(text: str, videos: int) -> str:
    text = text.replace("<document>", "<document-1>")
    return re.sub(r"<document-(\d{1,6})>", lambda match: f"<video-{int(match[1]) + videos}>", text)


def _as_list(value: Any, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError("bad-media", f"{what} is a {type(value).__name__}, expected a list")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
