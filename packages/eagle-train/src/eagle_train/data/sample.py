"""Rows in, samples out: every accepted spelling of a conversation with media becomes one `Sample`.

Media are taken in the order in which they are written; placeholders in the text stay as they are (`eagle_model.prompt` resolves
them). A document is a video whose frames are its pages: `<document-N>` in the text counts on after the row's videos.
Everything that a row says is used or refused by name; see `keys` for what is metadata, `turns` for conversations, `media` for references.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eagle_model.visual import VideoRef
from eagle_sampling import MediaError

from .clips import ENDS, RATES, STARTS, clip_of
from .errors import RowError
from .keys import KINDS, MEDIA, ROW_KEYS, SYSTEM, RowFormat, check_keys, has_video, says_nothing, short, with_columns, without_nulls
from .media import ImageRef, Media
from .sources import open_rows, parse_row
from .turns import Message, messages_of

__all__ = ["Address", "ImageRef", "RowError", "RowFormat", "Sample", "VideoRef", "load_sample", "normalise", "parse_row"]

_PLAIN = RowFormat()


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: `messages` (role, content with `<image-N>`/`<video-N>`), its media in order, and where it came from."""

    messages: list[Message]
    images: tuple[ImageRef, ...]
    videos: tuple[VideoRef, ...]
    source: str
    line: int


class Address(NamedTuple):
    """Where a row stands, so that a process reads it without the facts: (`offset`, `size`) is its address in the file `annotation`.

    line: 1-based, over all files of the source. root: folder that relative media paths start from. system: system message of rows that
    have none. form: how the source's rows are written.
    """

    source: str
    line: int
    annotation: str
    offset: int
    size: int
    root: str
    system: str | None
    form: RowFormat = _PLAIN


def load_sample(address: Address) -> Sample:
    """Read and normalise the row; raises RowError or OSError when the file changed since prepare."""
    try:
        row = open_rows(address.annotation).get(address.offset, address.size)
    except MediaError as error:  # a remote file
        raise RowError("unreadable", str(error)) from error
    return normalise(row, address.source, root=address.root, line=address.line, system=address.system, form=address.form)


def normalise(
    row: Mapping[str, Any], source: str, *, root: str | Path, line: int, system: str | None = None, form: RowFormat = _PLAIN
) -> Sample:
    """The one shape of a row.

    Args:
        row: the parsed row.
        source: name of the recipe's source.
        root: folder that relative media paths start from.
        line: 1-based number of the row, for messages.
        system: system message put first when the row has none; None adds nothing.
        form: columns of the source under other names.

    Raises:
        RowError: with reason `bad-row` (shape), `no-assistant-turn`, `bad-media` (a reference that can't be understood), `unknown-key`
            (something that nothing reads and that may change what the row means).
    """
    row = with_columns(row, form)
    absent = [kind for kind in KINDS if _says_absent(row, kind)]
    row = without_nulls(row)
    media = Media(root, form)
    for entry in _as_list(row.get("data"), "data"):
        _add_entry(entry, media)
    clip = _row_clip(row, form)
    for kind in KINDS:
        for key in MEDIA[kind]:
            if not says_nothing(row.get(key)) or row.get(key) == "":
                media.add(kind, row[key], clip=clip if kind == "video" else None)
    messages = messages_of(row, media, form)
    if not clip and media.videos and (lost := [key for key in clip_of(row) if key not in RATES]):
        raise RowError("bad-media", f"the row has {lost[0]!r}, and its video is in another place; write the bounds next to the video")
    check_keys(row, ROW_KEYS | {key for key, _ in form.columns}, "the row", with_video=has_video(row, form))
    _add_system(messages, row, system)
    _check_answers(messages, media)
    for kind in absent:
        if not media.count(kind) and any(f"<{kind}>" in message["content"] for message in messages if not message.get("numbered")):
            why = f"the text says <{kind}>, and {kind!r} of the row is null or empty; give the {kind}, or remove the key"
            raise RowError("bad-media", why)
    if media.documents:
        _number_documents(messages, len(media.videos), len(media.documents))
    return Sample(messages, tuple(media.images), (*media.videos, *media.documents), source, line)


def _says_absent(row: Mapping[str, Any], kind: str) -> bool:
    """Whether a row has a key for media of a kind, and nothing in it."""
    found = [key for key in MEDIA[kind] if key in row]
    return bool(found) and all(says_nothing(row[key]) for key in found)


def _add_entry(entry: Any, media: Media) -> None:
    """One of the mappings of `data`."""
    if not isinstance(entry, Mapping) or entry.get("type") not in KINDS:
        raise RowError("bad-media", f"data: {short(entry)} has no 'type' of {', '.join(KINDS)}")
    kind = entry["type"]
    items = entry.get(f"{kind}_list", entry.get(kind))
    if items is None:
        raise RowError("bad-media", f"data: an entry of type {kind} has no '{kind}_list'")
    clip = clip_of(entry, ranges=True) if kind == "video" else {}
    others = {key: value for key, value in entry.items() if key not in clip}
    check_keys(others, {"type", kind, f"{kind}_list"}, "an entry of data", with_video=kind == "video")
    media.add(kind, items, clip=clip)


def _row_clip(row: Mapping[str, Any], form: RowFormat) -> dict[str, Any]:
    """Bounds of a clip, and the rate of frames, that stand in the row next to its video; tables have numbers as text."""
    if not any(not says_nothing(row.get(key)) for key in MEDIA["video"]):
        named = [key for key, _ in form.columns if key in (*STARTS, *ENDS) and row.get(key) is not None]
        if named:
            raise RowError("bad-media", f"the row has {named[0]!r} and no video")
        return {}
    clip = clip_of(row)
    if not says_nothing(row.get("duration")) and clip.keys() & set(STARTS) and not clip.keys() & set(ENDS):
        raise RowError(
            "unknown-key",
            "the row has the start of a clip and 'duration', which may be that of the clip or of the file; write "
            "the end of the clip, or name 'duration' in ignore of the source",
        )
    videos = next(row[key] for key in MEDIA["video"] if not says_nothing(row.get(key)))
    if isinstance(videos, list) or (isinstance(videos, Mapping) and isinstance(videos.get("frames"), list)):
        return clip
    return {key: value for key, value in clip.items() if key not in RATES}  # of a file: what its maker noted about it


def _check_answers(messages: list[Message], media: Media) -> None:
    """Raise RowError where an answer says `<image>` and the row has an image that no question places: it would be moved to the question,
    and the word would be learned."""
    for kind in ("image", "video"):
        if not media.count(kind):
            continue
        placed, answers = 0, False
        for message in messages:
            found = len(re.findall(rf"<{kind}(?:-\d{{1,6}})?>", message["content"]))
            if message["role"] == "assistant" and not message.get("numbered"):
                answers = answers or found > 0
            else:
                placed += found
        if answers and placed < media.count(kind):
            why = f"the row has {media.count(kind)} {kind}s, its questions place {placed}, and an answer says <{kind}>"
            raise RowError("placeholders", f"{why}; place them in the questions, or write the {kind} as a content part of the answer")


def _add_system(messages: list[Message], row: Mapping[str, Any], system: str | None) -> None:
    given = {key: row[key] for key in SYSTEM if row.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            raise RowError("bad-row", f"{key} is a {type(value).__name__}, expected text")
    if len(set(given.values())) > 1:
        raise RowError("bad-row", f"the row has {' and '.join(map(repr, given))} with different texts; keep one")
    said = next(iter(given.values()), None)
    if said and messages[0]["role"] == "system":
        if messages[0]["content"] != said:
            raise RowError("bad-row", f"the row has a system message and {next(iter(given))!r} with another text; keep one")
    elif messages[0]["role"] != "system" and (said or system is not None):
        messages.insert(0, {"role": "system", "content": said or system})


def _number_documents(messages: list[Message], videos: int, documents: int) -> None:
    """Placeholders of documents as those of the videos behind the row's videos; placeholders without a number get theirs in order."""
    texts = [message for message in messages if message["role"] != "assistant" and not message.get("numbered")]
    for kind, first, count in (("document", videos, documents), ("video", 0, videos)):
        lone = sum(message["content"].count(f"<{kind}>") for message in texts)
        if lone and kind == "document" and lone not in (1, documents):
            raise RowError(
                "placeholders", f"{lone} placeholders <document> without a number, but {count} documents: number them as <document-1>, ..."
            )
        if count and lone in (1, count):
            number = first
            for message in texts:
                pieces = message["content"].split(f"<{kind}>")
                for place in range(len(pieces) - 1):
                    number += 1
                    pieces[place] += f"<video-{number}>"
                message["content"] = "".join(pieces)
        if kind == "document":
            for message in messages:
                if message["role"] != "assistant" or message.get("numbered"):
                    pieces = re.split(r"<document-(\d{1,6})>", message["content"])
                    pieces[1::2] = [_behind(int(piece), videos, documents) for piece in pieces[1::2]]
                    message["content"] = "".join(pieces)


def _behind(number: int, videos: int, documents: int) -> str:
    if not 1 <= number <= documents:
        raise RowError("placeholders", f"<document-{number}> has no document: the row has {documents}")
    return f"<video-{number + videos}>"


def _as_list(value: Any, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError("bad-media", f"{what} is a {type(value).__name__}, expected a list")
    return value
