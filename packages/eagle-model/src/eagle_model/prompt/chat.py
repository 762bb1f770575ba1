"""Messages in the forms that people have them: content blocks with media inside, ChatML strings, or plain questions.

All become the one shape that `eagle_model.prompt.render` takes: text with `<image-N>` and `<video-N>`, and the media in lists.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eagle_model.prompt.render import DEFAULT_SYSTEM, IM_END, IM_START, ROLES, PromptError, check_continued, check_messages

_TURN = re.compile(rf"{re.escape(IM_START)}(\w+)\n(.*?)(?:({re.escape(IM_END)})\n?|\Z)", re.DOTALL)


class Conversation(NamedTuple):
    """messages: role and text with placeholders. images, videos: what the placeholders stand for, number 1 first; all None when the blocks
    say only where media stand, as `{"type": "image"}` does: then media are given separately, in this order.

    answer_next: whether the text already ends with the assistant's header.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]
    answer_next: bool = False


def flatten(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Messages whose content is text or a list of blocks (`{"type": "text" | "image" | "image_url" | "video", ...}`).

    A medium becomes a placeholder where it stands, unless a text of the same kind of message mentions its number already. The words
    `<image>` and `<video>` in a message that has media are text; in one of text alone they are placeholders (see `place_media`).
    A block `{"type": "image"}` or `{"type": "video"}` stands for the next medium that is given separately.
    Raises PromptError for a block of unknown type or a text block without text, and for a conversation with media in some blocks only.
    """
    parsed = [(message.get("role"), _blocks(position, message.get("content"))) for position, message in enumerate(messages)]
    said = "".join(_text(blocks) for role, blocks in parsed if role != "assistant")
    media: dict[str, list[Any]] = {"image": [], "video": []}
    result = []
    for message, (role, blocks) in zip(messages, parsed):
        text = ""
        for kind, content in blocks:
            if kind == "text":
                text += content
                continue
            media[kind].append(content)
            placeholder = f"<{kind}-{len(media[kind])}>"
            if placeholder not in said:
                text += placeholder
        made: dict[str, Any] = {"role": role, "content": text}
        if any(kind != "text" for kind, _ in blocks):
            made["numbered"] = True
        if message.get("train") is False:
            made["train"] = False
        result.append(made)
    for kind, found in media.items():
        if any(one is None for one in found) and any(one is not None for one in found):
            raise PromptError(f"some {kind} blocks have a medium in them and others have none; give all in the blocks, or all separately")
    return Conversation(result, media["image"], media["video"])


def _text(blocks: Sequence[tuple[str, Any]]) -> str:
    return "".join(content for kind, content in blocks if kind == "text")


def _blocks(position: int, content: Any) -> list[tuple[str, Any]]:
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, list | tuple):
        raise PromptError(f"message {position} has content of type {type(content).__name__}; it must be text or a list of blocks")
    return [_block(block) for block in content]


def _block(block: Any) -> tuple[str, Any]:
    """Kind (text, image or video) and content of a block; a video with all that its block says about it."""
    if isinstance(block, str):
        return "text", block
    if not isinstance(block, Mapping):
        raise PromptError(f"a content block is of type {type(block).__name__}; it must be text or a mapping")
    kind = block.get("type") or next((name for name in ("text", "image", "image_url", "video") if name in block), None)
    if kind not in ("text", "image", "image_url", "video"):
        raise PromptError(f"a content block has the type {kind!r}; known are text, image, image_url and video")
    names = (kind,) if kind == "text" else (kind.removesuffix("_url"), kind, "path", "url")
    name = next((name for name in names if block.get(name) is not None), None)
    if name is None and kind in ("image", "video") and set(block) <= {"type", kind, "path", "url"}:
        return kind, None
    if name is None:
        raise PromptError(f"a content block of type {kind} has no {kind} in it")
    if kind == "video":
        rest = {key: value for key, value in block.items() if key not in ("type", name)}
        return "video", {"video": block[name], **rest} if rest else block[name]
    content = block[name]
    # OpenAI's form wraps the address once more.
    content = content["url"] if isinstance(content, Mapping) and "url" in content else content
    if kind == "image" and block.get("max_tiles") is not None:
        return "image", {"image": content, "max_tiles": block["max_tiles"]}
    return kind.removesuffix("_url"), content


def with_media(talk: Conversation, images: Any, videos: Any) -> Conversation:
    """The conversation with the media that its blocks hold, or with those that are given for blocks that only mark their places.

    Raises PromptError for media that are given both ways, and for another number of them than of blocks.
    """
    for kind, own, given in (("images", talk.images, images), ("videos", talk.videos, videos)):
        if not own or own[0] is None:
            continue
        if given:
            raise PromptError(f"{kind} stand in the content blocks and are given as an argument too; give them once")
    return talk._replace(images=_placed("image", talk.images, images), videos=_placed("video", talk.videos, videos))


def _placed(kind: str, own: list[Any], given: Any) -> list[Any]:
    """The media of a conversation: those in its blocks, or those that are given for blocks that only mark their places."""
    if own and own[0] is not None:
        return own
    media = list(given or ())
    if own and len(own) != len(media):
        raise PromptError(f"{len(own)} {kind} blocks have no {kind} in them, and {len(media)} {kind}s are given in {kind}s; give as many")
    return media


def chatml(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, continue_final_message: bool = False) -> str:
    """Messages as a ChatML string, placeholders as they are. Prefer messages where you can: a string can't tell data from structure.

    continue_final_message: leave the last message, an assistant's, open. Raises PromptError for messages that aren't (`check_messages`),
    and as `render` does for a message that can't be continued.
    """
    turns = check_messages(messages)
    text = "" if turns[0][0] == "system" else f"{IM_START}system\n{DEFAULT_SYSTEM}{IM_END}\n"
    text += "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in turns)
    if continue_final_message:
        check_continued(turns[-1][0], add_generation_prompt)
        return text.removesuffix(f"{IM_END}\n")
    return text + (f"{IM_START}assistant\n" if add_generation_prompt else "")


def parse_chatml(text: str) -> Conversation:
    """A ChatML string, or a plain question (then one user message that wants an answer).

    Raises PromptError for a broken string, and for one whose last turn isn't closed (`render_text` takes these).
    """
    if IM_START not in text:
        return Conversation([{"role": "user", "content": text}], [], [], True)
    messages = []
    answer_next = False
    place = 0
    for turn in _TURN.finditer(text):
        if text[place : turn.start()].strip() or turn[1] not in ROLES:
            raise PromptError(f"the prompt isn't ChatML at character {place}: {text[place : place + 40]!r}")
        answer_next = turn[3] is None and (turn[1], turn[2]) == ("assistant", "")
        if turn[3] is None and not answer_next:
            raise PromptError(
                f"the last turn ({turn[1]}) isn't closed with {IM_END}; close it, and end the string with {IM_START}assistant and a new "
                "line if an answer is wanted; to continue one that has begun, pass add_special_tokens=False"
            )
        if not answer_next:
            messages.append({"role": turn[1], "content": turn[2]})
        place = turn.end()
    if text[place:].strip():
        raise PromptError(f"the prompt isn't ChatML at character {place}: {text[place : place + 40]!r}")
    return Conversation(messages, [], [], answer_next)
