"""The turns of a row as messages: role, text with placeholders, and whether the turn is learned.

A message has `role` and `content`; `train: False` where its labels are masked; `numbered: True` where its media were content parts, so that
only placeholders with a number are media and the words `<image>` and `<video>` are text (see `eagle_model.prompt.place_media`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .clips import clip_of
from .errors import RowError
from .keys import KINDS, LOSS, MEDIA, TURNS, RowFormat, check_keys, short
from .media import Media

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "observation": "observation",
    "tool": "tool",
    "function": "tool",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_TURN_KEYS = frozenset({"from", "role", "value", "content", *LOSS})
_PART_NAMES = ("path", "url", "file", "bytes", "tar", "lmdb_file", "frames")
_TEXT_KEYS = frozenset({"type", "text", "cache_control"})

Message = dict[str, Any]


def messages_of(row: Mapping[str, Any], media: Media, form: RowFormat) -> list[Message]:
    """The messages of a row; media of its content parts are added to `media`. Raises RowError."""
    turns = _turns(row, form)
    given = {kind: media.count(kind) for kind in KINDS}
    parts = _Parts(media, given)
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise RowError("bad-row", f"turn {index + 1} is a {type(turn).__name__}, expected an object")
        name = turn.get("from", turn.get("role"))
        role = _role(name)
        if role is None:
            raise RowError("bad-row", f"turn {index + 1} is from {name!r}; known are {', '.join(ROLES)}")
        if role == "system" and index:
            raise RowError("bad-row", f"turn {index + 1} is a system message; it may only come first")
        _check_turn(turn, index)
        message: Message = {"role": role, **parts.content(turn.get("value", turn.get("content")), index)}
        if not _learned(turn, role, index):
            message["train"] = False
        messages.append(message)
    parts.check_all_shown()
    _check_order(messages)
    return messages


def _turns(row: Mapping[str, Any], form: RowFormat) -> list[Any]:
    mapped = {key for key, _ in form.columns}
    ways: dict[str, list[Any]] = {}
    for key in TURNS:
        value = row.get(key)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a table's column that holds JSON
            try:
                value = json.loads(value)
            except ValueError as error:
                raise RowError("bad-row", f"{key} is text that isn't JSON: {error}") from error
        if isinstance(value, list) and value:
            ways[key] = value
    if isinstance(row.get("texts"), list) and row["texts"]:
        ways["texts"] = _pairs(row["texts"])
    if "answer" in mapped and row.get("answer") is not None:
        question = row.get("question") if "question" in mapped else None
        question = form.question if question is None else question
        if question is None:
            raise RowError("bad-row", "the row has an answer and no question; set 'question' of the source, or name the column that has it")
        pair = {"user": question, "assistant": row["answer"]}
        ways["answer"] = _pairs([{key: str(value) if _is_number(value) else value for key, value in pair.items()}])
    if len(ways) > 1:
        raise RowError("bad-row", f"{' and '.join(ways)} both hold the turns of the row; name one of them in ignore of the source")
    if not ways:
        raise RowError("bad-row", _no_turns(row))
    return next(iter(ways.values()))


def _no_turns(row: Mapping[str, Any]) -> str:
    empty = [key for key in TURNS if isinstance(row.get(key), list)]
    if empty:
        return f"no 'conversations' or 'messages' with a turn: {empty[0]!r} is empty"
    keys = ", ".join(map(str, row)) or "none"
    return (
        f"no 'conversations' or 'messages'; keys are {keys}; columns of the source maps others, for example {{question: ..., answer: ...}}"
    )


def _pairs(texts: list[Any]) -> list[Any]:
    """FineVision's `{user, assistant}` as turns."""
    turns = []
    for number, pair in enumerate(texts):
        if not isinstance(pair, Mapping) or not {"user", "assistant"} <= set(pair):
            raise RowError("bad-row", f"texts: item {number + 1} has no 'user' and 'assistant'")
        turns += [{"role": role, "content": pair[role]} for role in ("user", "assistant")]
    return turns


def _check_turn(turn: Mapping[str, Any], index: int) -> None:
    kinds = [key for names in MEDIA.values() for key in names if turn.get(key)]
    if kinds:
        where = "media stand in the row itself, or in parts of the turn's content"
        raise RowError("unknown-key", f"turn {index + 1} has {kinds[0]!r}; {where}")
    check_keys(turn, _TURN_KEYS, f"turn {index + 1}")
    if {"from", "role"} <= turn.keys() and _role(turn["from"]) != _role(turn["role"]):
        raise RowError("bad-row", f"turn {index + 1} is from {turn['from']!r} and has the role {turn['role']!r}; keep one of them")
    if {"value", "content"} <= turn.keys() and turn["value"] != turn["content"]:
        raise RowError("bad-row", f"turn {index + 1} has a value and another content; keep one of them")


def _role(name: Any) -> str | None:
    return ROLES.get(name) if isinstance(name, str) else None


def _learned(turn: Mapping[str, Any], role: str, index: int) -> bool:
    said: dict[str, bool] = {}
    for key in LOSS:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowError("bad-row", f"{key} of turn {index + 1} is {short(value)}; a turn is learned (true, 1) or not (false, 0)")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise RowError("bad-row", f"turn {index + 1} says {', '.join(f'{key} = {value}' for key, value in said.items())}; keep one of them")
    if role != "assistant":
        if any(key != "weight" and value for key, value in said.items()):
            raise RowError("bad-row", f"turn {index + 1} is from {role} and asks for a loss; only turns of the assistant are learned")
        return True
    return next(iter(said.values()), True)


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError("no-assistant-turn", f"{len(messages)} turns, none from the assistant: there is nothing to learn")
    if "user" not in roles[: len(roles) - roles[::-1].index("assistant")]:
        raise RowError("bad-row", "no turn from the user before the assistant's last one: nothing is asked")


class _Parts:
    """Content of turns; content parts add their media, and parts without one stand for media of the row itself, in order."""

    def __init__(self, media: Media, given: Mapping[str, int]) -> None:
        self.media, self.given = media, given
        self.shown = dict.fromkeys(KINDS, 0)

    def content(self, value: Any, index: int) -> Message:
        if isinstance(value, str):
            return {"content": _text(value, index)}
        if isinstance(value, Mapping):  # a single part
            value = [value]
        if not isinstance(value, list):
            raise RowError("bad-row", f"the text of turn {index + 1} is a {type(value).__name__}, expected text")
        pieces = self._pieces(value, index)
        message: Message = {"content": "".join(text for _, text in pieces)}
        if any(kind != "text" for kind, _ in pieces):
            message["numbered"] = True
        return message

    def _pieces(self, parts: list[Any], index: int) -> list[tuple[str, str]]:
        """(kind, text or placeholder) of content parts, which stand where they are shown; a list among them is taken apart."""
        pieces: list[tuple[str, str]] = []
        for part in parts:
            if isinstance(part, list):
                pieces += self._pieces(part, index)
                continue
            if isinstance(part, str):
                pieces.append(("text", _text(part, index)))
                continue
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in (None, "text") and isinstance(part, Mapping) and isinstance(part.get("text", part.get("content")), str | list):
                text = part.get("text", part.get("content"))
                check_keys(part, _TEXT_KEYS | {"content"}, f"a text part of turn {index + 1}")
                pieces += [("text", _text(text, index))] if isinstance(text, str) else self._pieces(text, index)
            elif kind in ("image", "image_url", "video", "video_url", "document"):
                pieces += [(kind, text) for text in self._medium(part, kind, index)]
            else:
                raise RowError("bad-row", f"turn {index + 1} has a part {short(part)}; known types are text, image, video, document")
        return pieces

    def _medium(self, part: Mapping[str, Any], kind: str, index: int) -> list[str]:
        name = kind.removesuffix("_url")
        about = {key: value for key, value in part.items() if key != "type"}
        item = about.pop(kind, None)
        if item is None:
            item = about.pop(name, None)
        if item is None and not any(about.get(key) is not None for key in _PART_NAMES):
            return self._given(name, about, index)
        if item is None:  # {"type": "image", "path": ...}: the part is the reference
            item, about = about, {}
        if isinstance(item, Mapping) and isinstance(item.get("url"), str | Mapping):  # OpenAI wraps the address once more
            item = {**item, "path": item["url"]}
            del item["url"]
        clip = clip_of(about, ranges=True) if name == "video" else {}
        about = {key: value for key, value in about.items() if key not in clip and key != "detail"}
        if unknown := [key for key, value in about.items() if value is not None]:
            raise RowError("unknown-key", f"a part of turn {index + 1} has the keys {', '.join(map(repr, unknown))}, which nothing reads")
        before = self.media.count(name)
        self.media.add(name, item, clip=clip)
        if self.media.count(name) == before:
            raise RowError("bad-media", f"turn {index + 1} has a part that shows no {name}: {short(part)}")
        return [f"<{name}-{number}>" for number in range(before + 1, self.media.count(name) + 1)]

    def _given(self, kind: str, about: Mapping[str, Any], index: int) -> list[str]:
        self.shown[kind] += 1  # pyright: ignore[reportArgumentType]
        if self.shown[kind] > self.given[kind]:  # pyright: ignore[reportArgumentType]
            raise RowError(
                "bad-media",
                f"turn {index + 1} has a part of type {kind} without a {kind} in it, and the row has {self.given[kind]} of its own; "
                f"{self.shown[kind]} are shown",  # pyright: ignore[reportArgumentType]
            )
        if unknown := [key for key, value in about.items() if value is not None]:
            raise RowError("unknown-key", f"a part of turn {index + 1} has the keys {', '.join(map(repr, unknown))}, which nothing reads")
        return [f"<{kind}-{self.shown[kind]}>"]  # pyright: ignore[reportArgumentType]

    def check_all_shown(self) -> None:
        for kind, shown in self.shown.items():
            if shown and shown != self.given[kind]:
                raise RowError("bad-media", f"the row has {self.given[kind]} {kind}s and {shown} parts that show one; write as many parts")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: str, index: int) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError("bad-row", f"the text of turn {index + 1} has half of a surrogate pair: {error}") from error
    return value
