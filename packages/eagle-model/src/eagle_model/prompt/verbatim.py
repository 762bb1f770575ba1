"""A prompt that is ChatML already, or a part of one: what programs pass that render conversations to text themselves (TRL)."""

import re
from collections.abc import Sequence

from eagle_model.prompt.render import IM_END, IM_START, Media, Segment, SegmentBuilder, VideoSpan, place_media

_STRUCTURE = re.compile(f"({re.escape(IM_START)}|{re.escape(IM_END)})")
_ANSWER = "assistant\n"


def render_text(text: str, *, images: Sequence[int] = (), videos: Sequence[VideoSpan] = ()) -> list[Segment]:
    """A text as segments; nothing is added to it, no system message and no turn. For a whole conversation the ids are those of `render`.

    text: `<|im_start|>` and `<|im_end|>` are tokens in it; placeholders are those of a user's message (see `place_media`). What an
    assistant says has labels where its header is part of the text. images, videos: as in `render`.
    Raises PromptError for media without a placeholder, and as `render` does.
    """
    builder = SegmentBuilder()
    header = labelled = False  # whether a role follows, whether an assistant speaks
    for piece in cut_text(text, len(images), len(videos)):
        if isinstance(piece, Media):
            builder.medium(piece, images, videos)
            header = False
            continue
        for part in _STRUCTURE.split(piece):
            if part == IM_START:
                builder.special(IM_START)
                labelled = False
            elif part == IM_END:
                builder.special(IM_END, labelled)
                labelled = False
            elif header and part.startswith(_ANSWER):
                builder.text(_ANSWER)
                labelled = True
                builder.text(part.removeprefix(_ANSWER), labelled)
            else:
                builder.text(part, labelled)
            header = part == IM_START
    return builder.segments


def cut_text(text: str, images: int, videos: int) -> list[str | Media]:
    """A text cut at its placeholders. Raises PromptError as `render_text` does."""
    [(_, pieces)] = place_media([{"role": "user", "content": text}], images, videos, add_missing=False)
    return pieces
