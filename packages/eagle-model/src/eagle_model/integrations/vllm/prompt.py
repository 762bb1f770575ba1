"""Prompts between vLLM's renderer and its media processor: ChatML as token ids, with placeholders as text.

vLLM passes token ids from one to the other. Ids keep what a string would lose: whether `<|im_end|>` is structure or text of a user.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eagle_model.prompt import IM_END, IM_START, IMG_CONTEXT, PromptError, Special, Text, encode
from eagle_model.prompt.encode import TextEncoder
from eagle_model.prompt.render import IMG_END, IMG_START, ROLES, check_messages


class ParsedPrompt(NamedTuple):
    """Messages of a prompt. answer_next: it ends with the assistant's header; open_answer: the last message is to be continued."""

    messages: list[dict[str, str]]
    answer_next: bool
    open_answer: bool


def unexpanded_ids(
    messages: Sequence[Mapping[str, Any]], encoder: TextEncoder, *, add_generation_prompt: bool, continue_final_message: bool = False
) -> list[int]:
    """Ids of messages whose placeholders `<image-N>` and `<video-N>` stay text. Raises PromptError (`check_messages`)."""
    turns = check_messages(messages)
    segments: list[Text | Special] = []
    for role, content in turns:
        segments += [Special(IM_START), Text(f"{role}\n{content}"), Special(IM_END), Text("\n")]
    if continue_final_message:
        del segments[-2:]
    elif add_generation_prompt:
        segments += [Special(IM_START), Text("assistant\n")]
    return encode(segments, encoder).input_ids.tolist()


def parse_ids(ids: Sequence[int], encoder: TextEncoder) -> ParsedPrompt:
    """The messages of a ChatML prompt, or of a plain question, which becomes one message of the user.

    Raises PromptError for ids that are neither, or that hold visual tokens already.
    """
    start, end = encoder.token_id(IM_START), encoder.token_id(IM_END)
    for token in (IMG_CONTEXT, IMG_START, IMG_END):
        if encoder.token_id(token) in ids:
            raise PromptError(f"the prompt holds {token} already; write <image-1> or <video-1> where a medium stands")

    def text(run: Sequence[int]) -> str:
        return encoder.tokenizer.decode(list(run), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    if start not in ids:
        return ParsedPrompt([{"role": "user", "content": text(ids)}], True, False)
    before, *turns = _split(ids, start)
    if text(before).strip():
        raise PromptError(f"the prompt has text before its first {IM_START}: {text(before)[:40]!r}")
    messages: list[dict[str, str]] = []
    for place, turn in enumerate(turns):
        body, *rest = _split(turn, end)
        closed = bool(rest)
        role, line_end, content = text(body).partition("\n")
        if role not in ROLES or not line_end or len(rest) > 1 or (rest and text(rest[0]).strip()):
            raise PromptError(f"turn {place + 1} of the prompt is not ChatML: {text(turn)[:40]!r}")
        if not closed and (place < len(turns) - 1 or role != "assistant"):
            raise PromptError(f"turn {place + 1} of the prompt ({role}) is not closed with {IM_END}")
        if not closed and not content:
            return ParsedPrompt(messages, True, False)
        messages.append({"role": role, "content": content})
        if not closed:
            return ParsedPrompt(messages, False, True)
    return ParsedPrompt(messages, False, False)


def _split(ids: Sequence[int], token: int) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for one in ids:
        if one == token:
            runs.append([])
        else:
            runs[-1].append(one)
    return runs
