"""Messages in the forms that people have them: content blocks with media inside, ChatML strings, or plain questions.

All become the one shape that `eagle_model.prompt` renders: text with `<image-N>` and `<video-N>`, and the media in lists.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eagle_model.prompt import DEFAULT_SYSTEM, IM_END, IM_START, ROLES, PromptError

_TURN = re.compile(rf"{re.escape(IM_START)}(\w+)\n(.*?)(?:{re.escape(IM_END)}\n?|\Z)", re.DOTALL)


class Conversation(NamedTuple):
    """messages: role and text with placeholders. images, videos: what the placeholders stand for, number 1 first.

    answer_next: whether the text already ends with the assistant's header.
    """

    messages: list[dict[str, str]]
    images: list[Any]
    videos: list[Any]
    answer_next: bool = False


def flatten(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Messages whose content is text or a list of blocks (`{"type": "text" | "image" | "image_url" | "video", ...}`).

    A medium becomes a placeholder where it stands, unless a text of the same kind of message mentions its number already.
    Raises PromptError for a block of unknown type or without its medium.
    """
    said = "".join(_texts(message) for message in messages if message.get("role") != "assistant")
    images: list[Any] = []
    videos: list[Any] = []
    result = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, list | tuple):
            result.append({"role": message.get("role"), "content": content})
            continue
        text = ""
        for block in content:
            kind, medium = _medium(block)
            if kind == "text":
                text += medium
                continue
            found = images if kind == "image" else videos
            found.append(medium)
            placeholder = f"<{kind}-{len(found)}>"
            if placeholder not in said:
                text += placeholder
        result.append({"role": message.get("role"), "content": text})
    return Conversation(result, images, videos)


def _texts(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(block if isinstance(block, str) else block.get("text", "") for block in content or ())


def _medium(block: Any) -> tuple[str, Any]:
    if isinstance(block, str):
        return "text", block
    kind = block.get("type") or next((name for name in ("text", "image", "image_url", "video") if name in block), None)
    if kind == "text":
        return "text", block["text"]
    if kind in ("image", "image_url"):
        medium = next((block[name] for name in ("image", "image_url", "path", "url") if block.get(name) is not None), None)
        # OpenAI's form wraps the address once more.
        medium = medium["url"] if isinstance(medium, Mapping) and "url" in medium else medium
    elif kind == "video":
        clip = {name: block[name] for name in ("start", "end", "start_time", "end_time") if name in block}
        medium = next((block[name] for name in ("video", "path", "url") if block.get(name) is not None), None)
        medium = {"path": medium, **clip} if clip and medium is not None else medium
    else:
        raise PromptError(f"a content block has the type {kind!r}; known are text, image, image_url and video")
    if medium is None:
        raise PromptError(f"a content block of type {kind} has no {kind} in it")
    return ("video" if kind == "video" else "image"), medium


def chatml(messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
    """Messages as a ChatML string, placeholders as they are. Prefer messages where you can: a string can't tell data from structure."""
    text = "" if messages and messages[0]["role"] == "system" else f"{IM_START}system\n{DEFAULT_SYSTEM}{IM_END}\n"
    text += "".join(f"{IM_START}{message['role']}\n{message['content']}{IM_END}\n" for message in messages)
    return text + (f"{IM_START}assistant\n" if add_generation_prompt else "")


def parse_chatml(text: str) -> Conversation:
    """A ChatML string, or a plain question (then one user message that wants an answer). Raises PromptError for a broken string."""
    if IM_START not in text:
        return Conversation([{"role": "user", "content": text}], [], [], True)
    messages = []
    place = 0
    for turn in _TURN.finditer(text):
        if text[place : turn.start()].strip() or turn[1] not in ROLES:
            raise PromptError(f"the prompt isn't ChatML at character {place}: {text[place : place + 40]!r}")
        messages.append({"role": turn[1], "content": turn[2]})
        place = turn.end()
    if text[place:].strip():
        raise PromptError(f"the prompt isn't ChatML at character {place}: {text[place : place + 40]!r}")
    answer_next = text.endswith(f"{IM_START}assistant\n")
    return Conversation(messages[:-1] if answer_next else messages, [], [], answer_next)
