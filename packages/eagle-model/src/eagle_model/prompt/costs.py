"""Token costs of a prompt before its frames are chosen: fixed tokens of the text, and tokens that each frame adds.

ADS needs upper bounds. When a row is prepared everything in its prompt is known except the numbers of frames, their times and the sampling
rate. If the tokenizer separates digits from other text and every run of n digits has the same number of tokens (Qwen, Llama 3, SmolLM2;
this is checked for each tokenizer), costs are exact for given numbers of digits. Otherwise the number of bytes is the bound: a token
stands for at least one byte.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from eagle_model.prompt.encode import TextEncoder
from eagle_model.prompt.render import Segment, Special, Text, VideoSpan, frame_header, render
from eagle_model.prompt.verbatim import render_text

#: Tokens around the visual tokens of a frame: `<img>` and `</img>`.
TAG_TOKENS = 2
# A sentence-piece tokenizer may put a prefix before a text.
_PREFIX = 1
_FRAMES_KEPT = 1 << 16
_LONGEST_TIME = 9_999_999.99
_RATES = (1.11, 11.11, 111.11)


class TextCost(NamedTuple):
    """text_tokens: all tokens of a prompt that aren't tiles or frames. label_tokens: those of them that carry loss."""

    text_tokens: int
    label_tokens: int


class FrameCosts(NamedTuple):
    """Tokens around a frame (tags, number, time) by digits: `table[digits of the count][digits before the point of the time]`, [8, 8].

    Column 0 is for frames without a time (pages). An upper bound for every frame of that class, for one tokenizer.
    """

    table: tuple[tuple[int, ...], ...]

    def overhead(self, counts: np.ndarray, last_times: np.ndarray) -> np.ndarray:
        """int64 [V]: most tokens that a frame adds to its tile, for videos of `counts` frames with times up to `last_times` seconds (NaN:
        no times)."""
        powers = 10 ** np.arange(1, 7)
        rows = 1 + np.searchsorted(powers, np.maximum(counts, 1), side="right")
        # 9.995 prints as 10.00: times change class 0.005 early, and a little more because of rounding.
        columns = np.where(np.isnan(last_times), 0, 1 + np.searchsorted(powers - 0.00501, np.nan_to_num(last_times), side="right"))
        return np.asarray(self.table, np.int64)[rows, columns]


class PromptCosts:
    """Token costs of prompts for one tokenizer.

    For a sample, `fixed_tokens(...).text_tokens` + the tokens of its image tiles + `frames_tokens` of each video is its length: exactly
    without videos, and at most (a token or two too much for each video) with them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.encoder = tokenizer if isinstance(tokenizer, TextEncoder) else TextEncoder(tokenizer)
        self.digits_alike = self._digits_alike()
        self._frames: dict[tuple[int, float | None], int] = {}

    @cached_property
    def frame_costs(self) -> FrameCosts:
        """Tokens around a frame for every number of digits that its number and its time can have."""
        return FrameCosts(
            tuple(
                tuple(self.frame_tokens(10 ** max(digits, 1) - 1, None if whole == 0 else 10.0**whole - 0.01, 0) for whole in range(8))
                for digits in range(8)
            )
        )

    def fixed_tokens(
        self,
        messages: Sequence[Mapping[str, Any]] | str,
        images: int = 0,
        videos: int = 0,
        *,
        timed: Sequence[bool] | None = None,
        add_generation_prompt: bool = False,
    ) -> TextCost:
        """Tokens of everything but tiles and frames: text, roles, image tags, video headers (as an upper bound over their numbers).

        messages: as in `render`, or a text as in `render_text`.
        timed: per video whether its times are known (default: all are); a document's pages have none.
        Raises PromptError when the messages can't be rendered.
        """
        known = [True] * videos if timed is None else list(timed)
        if len(known) != videos:
            raise ValueError(f"timed says {len(known)} videos, but there are {videos}")
        rendered = (
            partial(render_text, messages)
            if isinstance(messages, str)
            else partial(render, messages, add_generation_prompt=add_generation_prompt)
        )
        if not videos:
            return self._count(rendered(images=[0] * images))
        # One frame per video stands in for all: it shares its text with the header. The frame's own cost is taken off again.
        variants: list[list[int]] = []
        labels = 0
        for rate in (*_RATES, None):
            spans = [VideoSpan([1.11] if has_times else None, rate, 0, 1) for has_times in known]
            segments = rendered(images=[0] * images, videos=spans)
            variants.append(self._lengths(segments))
            labels = sum(length for segment, length in zip(segments, variants[-1]) if not _plain(segment))
        total = sum(max(lengths) for lengths in zip(*variants, strict=True))
        if self.digits_alike:
            return TextCost(total - sum(self._frame(1, 1.11 if has_times else None) for has_times in known), labels)
        # Digits that cost what they like: count the whole shared text in bytes, frame 1 with the longest time that we allow for.
        spans = [VideoSpan([_LONGEST_TIME] if has_times else None, max(_RATES), 0, 1) for has_times in known]
        segments = rendered(images=[0] * images, videos=spans)
        exact = self._lengths(segments)
        following = [isinstance(after, Special) and after.token == "<img>" for after in (*segments[1:], None)]
        total = 0
        for segment, length, before_tile in zip(segments, exact, following):
            total += len(segment.text.encode()) + _PREFIX if isinstance(segment, Text) and before_tile else length
        return TextCost(total, labels)

    def frame_tokens(self, count: int, end_time: float | None, k: int) -> int:
        """`k` + the largest overhead of any of `count` frames with times up to `end_time` seconds (None: times aren't known)."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        digits = range(1, len(str(count)) + 1)
        numbers = [min(count, int("1" * digit)) if self.digits_alike else count for digit in digits]
        if end_time is None:
            return k + max(self._frame(number, None) for number in numbers)
        whole = len(f"{end_time:.2f}") - 3
        if not self.digits_alike:
            return k + self._frame(count, float("9" * whole) if whole > 1 else 9.0)
        return k + max(self._frame(number, float("1" * digit)) for number in numbers for digit in range(1, whole + 1))

    def frames_tokens(self, times: Sequence[float] | None, k: int, *, frames: int | None = None) -> int:
        """Tokens of all frames of one video; `times` in seconds, or None and `frames` pages."""
        count = VideoSpan(times, None, k, frames).count
        stamps: Sequence[float | None] = [None] * count if times is None else times
        return count * k + sum(self._frame(number + 1, None if time is None else float(time)) for number, time in enumerate(stamps))

    def _frame(self, number: int, time: float | None) -> int:
        known = self._frames.get((number, time))
        if known is None:
            if len(self._frames) >= _FRAMES_KEPT:
                self._frames.clear()
            header = frame_header(number, time)
            known = len(self.encoder.pieces([header])[0]) if self.digits_alike else len(header.encode()) + _PREFIX
            known = self._frames[number, time] = known + TAG_TOKENS
        return known

    def _lengths(self, segments: Sequence[Segment]) -> list[int]:
        texts = iter(self.encoder.pieces([segment.text for segment in segments if isinstance(segment, Text)]))
        return [
            len(next(texts)) if isinstance(segment, Text) else 1 if isinstance(segment, Special) else segment.count for segment in segments
        ]

    def _count(self, segments: Sequence[Segment]) -> TextCost:
        lengths = self._lengths(segments)
        return TextCost(sum(lengths), sum(length for segment, length in zip(segments, lengths) if not _plain(segment)))

    def _digits_alike(self) -> bool:
        """Whether runs of digits stand alone as pieces of at most three and all runs of a length cost the same."""
        backend = getattr(self.encoder.tokenizer, "backend_tokenizer", None)
        if backend is None or backend.pre_tokenizer is None:
            return False
        sample = "text The first video sampled with 123.45 fps: Frame 1234567 sample at 1234567.89s: Frame 12: "
        longest = 0
        for piece, (start, end) in backend.pre_tokenizer.pre_tokenize_str(sample):
            source = sample[start:end]
            if any(character.isdigit() for character in source):
                if not source.isdigit() or len(piece) != len(source):
                    return False
                longest = max(longest, len(source))
        if longest > 3:
            return False
        for digits in range(1, longest + 1):
            runs = [f"{number:0{digits}d}" for number in range(10**digits)]
            if len({len(ids) for ids in self.encoder.pieces(runs)}) != 1:
                return False
        return True


def _plain(segment: Segment) -> bool:
    return not getattr(segment, "labelled", False)
