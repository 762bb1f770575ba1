"""Messages and the sizes of their media become the segments of a prompt: ChatML with the media tags of Eagle 2.5.

A prompt is a list of segments. `Special` is one token written by its id, `VisualTokens` is a run of `<IMG_CONTEXT>` written by its id, and
`Text` is what lies between. Text is tokenised by itself, as a byte-level tokenizer does with the whole string, because special tokens
split the text first. Therefore the lengths of segments add up.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eagle_model.errors import ModelError

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
IMG_CONTEXT = "<IMG_CONTEXT>"
IMG_START = "<img>"
IMG_END = "</img>"
#: Markup of grounded answers. It belongs to the text, so it is parsed where it occurs in data; every other special token is not.
GROUNDING_TOKENS = ("<box>", "</box>", "<quad>", "</quad>", "<ref>", "</ref>", "<interval>", "</interval>")
#: The tokens that Eagle adds to a language model's tokenizer, in the order of the released checkpoints.
EAGLE_TOKENS = (IMG_CONTEXT, IMG_START, IMG_END, *GROUNDING_TOKENS)
#: Tokens that build the prompt; data text can never produce one of them.
STRUCTURAL_TOKENS = (IM_START, IM_END, IMG_CONTEXT, IMG_START, IMG_END)

DEFAULT_SYSTEM = "You are a helpful assistant.\n"
ROLES = ("system", "user", "assistant", "observation", "tool")
IGNORE_INDEX = -100
#: Rates print as at most three digits before the point, which bounds what a video header can cost before its rate is known.
MAX_FPS = 999.99

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_PLACEHOLDER = re.compile(r"<(image|video)(?:-(\d+))?>")


class PromptError(ModelError):
    """Messages that can't be rendered: an unknown role, or placeholders that don't agree with the media of the sample."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is tokenised by itself; its special tokens (except grounding markup) are read as plain characters."""

    text: str
    labelled: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    """One special token, written by its id."""

    token: str
    labelled: bool = False


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """`count` image tokens, written by their id: image number `index` (1-based), or frame number `frame` (1-based) of a video."""

    count: int
    media: str = "image"
    index: int = 1
    frame: int = 0


Segment = Text | Special | VisualTokens


@dataclass(frozen=True, slots=True)
class VideoSpan:
    """What the prompt says about one video or document.

    times: presentation time of each frame in seconds, or None when they aren't known (then give `frames`, the number of frames or pages).
    fps: the rate at which the frames were sampled, or None. tokens_per_frame: `k` of the model, one tile a frame.
    """

    times: Sequence[float] | None
    fps: float | None
    tokens_per_frame: int
    frames: int | None = None

    @property
    def count(self) -> int:
        if self.times is not None:
            if self.frames is not None and self.frames != len(self.times):
                raise PromptError(f"a video has {len(self.times)} times but says that it has {self.frames} frames; give one of the two")
            return len(self.times)
        if self.frames is None:
            raise PromptError("a video without times must say how many frames or pages it has: VideoSpan(times=None, ..., frames=n)")
        return self.frames


class Media(NamedTuple):
    """One image or video where it stands in the messages; `number` is 1-based."""

    kind: str
    number: int


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Role and text of each message. Raises PromptError for an empty conversation, an unknown role, or content that isn't text."""
    if not messages:
        raise PromptError("the conversation has no messages")
    contents: list[tuple[str, str]] = []
    for position, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise PromptError(f"message {position} has role {role!r}; the roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise PromptError(f"message {position} ({role}) has content of type {type(content).__name__}; it must be text")
        contents.append((role, content))
    return contents


def with_system(messages: Sequence[Mapping[str, Any]], system: str | None) -> list[Mapping[str, Any]]:
    """The messages, with `system` as their system message if they have none; None adds nothing (`render` then writes `DEFAULT_SYSTEM`)."""
    if system is None or (messages and messages[0].get("role") == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def place_media(
    messages: Sequence[Mapping[str, Any]], images: int, videos: int, *, add_missing: bool = True
) -> list[tuple[str, list[str | Media]]]:
    """Messages with their placeholders resolved: per message its role and its content cut into text and media.

    `<image-N>` and `<video-N>` are 1-based. A lone `<image>` is number 1; as many of them as there are images are numbers 1, 2, ... in
    order. Where no medium of that kind is left for them, `<image>` and `<video>` are text. Media that no message mentions go before the
    first user text, images first; without add_missing they are an error.

    A message with `numbered` true was made from content blocks: only placeholders with a number are media in it, and its media are not
    those of `<image>` elsewhere. What an assistant says is text, except in such a message.

    Raises PromptError for messages that aren't (`check_messages`), a number without a medium, a medium that is placed twice, or media
    without a user message.
    """
    counts = {"image": images, "video": videos}
    contents = check_messages(messages)
    from_blocks = [bool(message.get("numbered")) for message in messages]
    parsed = [blocks or role != "assistant" for (role, _), blocks in zip(contents, from_blocks)]
    lone = {"image": 0, "video": 0}
    numbered: dict[str, set[int]] = {"image": set(), "video": set()}
    in_blocks: dict[str, set[int]] = {"image": set(), "video": set()}
    for (_, content), blocks, read in zip(contents, from_blocks, parsed):
        for kind, number in _PLACEHOLDER.findall(content) if read else ():
            if not number:
                lone[kind] += not blocks
                continue
            if not 1 <= int(number) <= counts[kind]:
                raise PromptError(f"<{kind}-{number}> has no {kind}: the sample has {counts[kind]}")
            if int(number) in numbered[kind]:
                raise PromptError(f"<{kind}-{number}> stands more than once; write each placeholder once")
            numbered[kind].add(int(number))
            if blocks:
                in_blocks[kind].add(int(number))
    free = {kind: [number for number in range(1, count + 1) if number not in in_blocks[kind]] for kind, count in counts.items()}
    for kind, number in lone.items():
        if not free[kind]:
            continue
        by_text = numbered[kind] - in_blocks[kind]
        if number > 1 and (number != len(free[kind]) or by_text):
            raise PromptError(
                f"{number} placeholders <{kind}> without a number, but {len(free[kind])} {kind}s: number them as <{kind}-1>, ..."
            )
        if number == 1 and free[kind][0] in by_text:
            raise PromptError(f"<{kind}> means {kind} number {free[kind][0]}, but <{kind}-{free[kind][0]}> stands too")

    result: list[tuple[str, list[str | Media]]] = []
    used = {"image": 0, "video": 0}
    for (role, content), blocks, read in zip(contents, from_blocks, parsed):
        pieces: list[str | Media] = []
        start = 0
        for match in _PLACEHOLDER.finditer(content) if read else ():
            kind = match[1]
            if match[2]:
                number = int(match[2])
            elif blocks or not free[kind]:
                continue
            else:
                number = free[kind][used[kind]]
                used[kind] += 1
                numbered[kind].add(number)
            pieces += [content[start : match.start()], Media(kind, number)]
            start = match.end()
        pieces.append(content[start:])
        result.append((role, [piece for piece in pieces if piece != ""]))
    missing = [Media(kind, number) for kind in counts for number in range(1, counts[kind] + 1) if number not in numbered[kind]]
    if missing and not add_missing:
        raise PromptError(
            f"{missing[0].kind} {missing[0].number} has no placeholder; write <{missing[0].kind}-{missing[0].number}> where it belongs"
        )
    if missing:
        for role, pieces in result:
            if role == "user":
                pieces[:0] = missing
                break
        else:
            raise PromptError(f"{len(missing)} media have no placeholder and there is no user message to put them in")
    return result


def media_order(messages: Sequence[Mapping[str, Any]], images: int, videos: int) -> list[Media]:
    """The media in the order in which they stand in the prompt, which is the order of their tiles."""
    return [piece for _, pieces in place_media(messages, images, videos) for piece in pieces if isinstance(piece, Media)]


def ordinal(number: int) -> str:
    """`first` ... `tenth`, then `11th`, `12th`, ..., `21st`."""
    if number < 1:
        raise ValueError(f"ordinals start at 1, got {number}")
    if number <= len(_ORDINALS):
        return _ORDINALS[number - 1]
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def video_header(number: int, fps: float | None) -> str:
    """What stands before the first frame of video `number`. Raises PromptError for a rate that isn't in 0 .. 999.99."""
    if fps is None:
        return f"The {ordinal(number)} video: "
    if not 0 <= fps <= MAX_FPS:
        raise PromptError(f"video {number} is sampled with {fps} fps; the prompt can say 0 to {MAX_FPS}")
    return f"The {ordinal(number)} video sampled with {fps:.2f} fps: "


def frame_header(number: int, time: float | None) -> str:
    """What stands before frame `number` (1-based); `time` in seconds. Raises PromptError for a negative or infinite time."""
    if time is None:
        return f"Frame {number}: "
    if not 0 <= time < float("inf"):
        raise PromptError(f"frame {number} has the time {time}; times are seconds from the start of the file, 0 or more")
    return f"Frame {number} sample at {time:.2f}s: "


def shown_times(times: np.ndarray, start: float | None = None) -> np.ndarray:
    """Times as the prompt prints them: from the clip's start, or from the file's zero; never below 0. times: float64 [n] seconds."""
    return np.maximum(np.asarray(times, np.float64) - (start or 0.0), 0.0)


def sampled_fps(count: int, seconds: float) -> float:
    """The rate that a video's header states: frames taken per second of the clip, at most what the prompt can print."""
    return min(count / seconds if seconds > 0 else float(count), MAX_FPS)


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    images: Sequence[int] = (),
    videos: Sequence[VideoSpan] = (),
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> list[Segment]:
    """Messages as segments.

    messages: `{"role": ..., "content": text with <image-N> / <video-N>}`; see `place_media` for how placeholders are resolved. An
    assistant's message with `train` false has no labels. Media in an assistant's message have none either.
    images: tokens of each image (tiles times `k`). videos: what the prompt says about each video.
    add_generation_prompt: end with `<|im_start|>assistant\\n`.
    continue_final_message: leave the last message, which must be an assistant's, without its end, so that generation continues it.

    Raises PromptError for continue_final_message with another last message or with add_generation_prompt, and as `place_media`,
    `video_header` and `frame_header` do.
    """
    builder = SegmentBuilder()
    placed = place_media(messages, len(images), len(videos))
    if continue_final_message:
        check_continued(placed[-1][0], add_generation_prompt)
    if placed[0][0] != "system":
        builder.special(IM_START)
        builder.text("system\n" + DEFAULT_SYSTEM)
        builder.special(IM_END)
        builder.text("\n")
    learned = [message.get("train", True) for message in messages]
    for number, ((role, pieces), trained) in enumerate(zip(placed, learned)):
        labelled = role == "assistant" and trained
        builder.special(IM_START)
        builder.text(role + "\n")
        is_open = continue_final_message and number == len(placed) - 1
        for piece in pieces:
            if isinstance(piece, str):
                builder.text(piece, labelled)
            else:
                builder.medium(piece, images, videos)
        if not is_open:
            builder.special(IM_END, labelled)
            builder.text("\n")
    if add_generation_prompt:
        builder.special(IM_START)
        builder.text("assistant\n")
    return builder.segments


def check_continued(role: str, add_generation_prompt: bool) -> None:
    """Raises PromptError where continue_final_message can't be done: role is that of the last message."""
    if role != "assistant" or add_generation_prompt:
        reason = "add_generation_prompt begins another" if add_generation_prompt else f"the last message is that of the {role}"
        raise PromptError(f"continue_final_message continues the assistant's last message, but {reason}")


class SegmentBuilder:
    """Collects segments; neighbouring text with the same label becomes one, so that it is tokenised as the whole string would be."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def text(self, text: str, labelled: bool = False) -> None:
        if not text:
            return
        last = self.segments[-1] if self.segments else None
        if isinstance(last, Text) and last.labelled == labelled:
            self.segments[-1] = Text(last.text + text, labelled)
        else:
            self.segments.append(Text(text, labelled))

    def special(self, token: str, labelled: bool = False) -> None:
        self.segments.append(Special(token, labelled))

    def medium(self, medium: Media, images: Sequence[int], videos: Sequence[VideoSpan]) -> None:
        """An image or a video with what the prompt says about it; images, videos: as in `render`."""
        number = medium.number
        if medium.kind == "image":
            self.text(f"<image {number}>")
            self.tile(VisualTokens(images[number - 1], "image", number))
            return
        span = videos[number - 1]
        count, times = span.count, span.times
        self.text(video_header(number, span.fps))
        for frame in range(count):
            self.text(frame_header(frame + 1, None if times is None else float(times[frame])))
            self.tile(VisualTokens(span.tokens_per_frame, "video", number, frame + 1))

    def tile(self, visual: VisualTokens) -> None:
        if visual.count < 0:
            raise PromptError(f"{visual.media} {visual.index} has {visual.count} tokens")
        self.segments += [Special(IMG_START), visual, Special(IMG_END)]


def to_text(segments: Sequence[Segment]) -> str:
    """The prompt as one string, for people and for golden tests; ids come from `encode`, which never parses data text."""
    return "".join(
        segment.text if isinstance(segment, Text) else segment.token if isinstance(segment, Special) else IMG_CONTEXT * segment.count
        for segment in segments
    )
