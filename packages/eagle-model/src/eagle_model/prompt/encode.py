"""Segments become ids and labels, with a tokenizer that reads special tokens inside data text as plain characters."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from eagle_model.prompt.render import (
    GROUNDING_TOKENS,
    IGNORE_INDEX,
    IMG_CONTEXT,
    STRUCTURAL_TOKENS,
    PromptError,
    Segment,
    Special,
    Text,
    VisualTokens,
)

_SURROGATE = re.compile("[\ud800-\udfff]")


class Encoded(NamedTuple):
    """input_ids: int64 [T]; labels: int64 [T], not shifted, -100 where no loss is taken."""

    input_ids: np.ndarray
    labels: np.ndarray


def encode(segments: Sequence[Segment], tokenizer: Any) -> Encoded:
    """Segments as ids and labels.

    tokenizer: a transformers tokenizer (or a `TextEncoder` made from one, which saves its preparation) that knows the tokens used.
    Raises PromptError when the tokenizer lacks a token of the prompt, and for text with half of a surrogate pair; TypeError for what is not
    a segment.
    """
    for segment in segments:
        if not isinstance(segment, Text | Special | VisualTokens):
            raise TypeError(f"encode takes the segments that render gives, not {segment!r}")
    encoder = tokenizer if isinstance(tokenizer, TextEncoder) else TextEncoder(tokenizer)
    pieces = iter(encoder.pieces([segment.text for segment in segments if isinstance(segment, Text)]))
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for segment in segments:
        if isinstance(segment, VisualTokens):
            piece = np.full(segment.count, encoder.token_id(IMG_CONTEXT), np.int64)
        elif isinstance(segment, Special):
            piece = np.array([encoder.token_id(segment.token)], np.int64)
        else:
            piece = np.array(next(pieces), np.int64)
        ids.append(piece)
        labelled = not isinstance(segment, VisualTokens) and segment.labelled
        labels.append(piece if labelled else np.full(len(piece), IGNORE_INDEX, np.int64))
    if not ids:
        return Encoded(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Encoded(np.concatenate(ids), np.concatenate(labels))


class TextEncoder:
    """A tokenizer that reads special tokens in data as plain characters.

    A protected token is cut after its first character and the parts are tokenised one after the other: the characters stay what they
    were, and no part holds the token. That works alike for every tokenizer, whatever it thinks of `split_special_tokens`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        protected = (special | set(STRUCTURAL_TOKENS)) - set(GROUNDING_TOKENS)
        # Longest first, so that a token isn't hidden by another that it starts with; single characters can't be cut and aren't tokens here.
        longest_first = sorted((token for token in protected if len(token) > 1), key=lambda token: (-len(token), token))
        self._protected = re.compile("|".join(re.escape(token) for token in longest_first))
        self._ids: dict[str, int] = {}
        # What a call of a fast tokenizer runs in the end, without the 40 us that the call takes, and without character offsets.
        self._backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None

    def token_id(self, token: str) -> int:
        """The id of a special token; PromptError when the tokenizer hasn't got it."""
        if token not in self._ids:
            found = self.tokenizer.convert_tokens_to_ids(token)
            if found is None or self.tokenizer.convert_ids_to_tokens(found) != token:
                raise PromptError(f"the tokenizer has no token {token}; eagle_model.tokenizer.add_eagle_tokens adds Eagle's")
            self._ids[token] = int(found)
        return self._ids[token]

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, tokenised by itself. Raises PromptError for text with half of a surrogate pair, which is not Unicode."""
        for text in texts:
            if not text.isascii() and (half := _SURROGATE.search(text)):
                before = text[max(0, half.start() - 20) : half.start()]
                raise PromptError(
                    f"the text has half of a surrogate pair, {half[0]!r} after {before!r}; it comes from cut text or bytes that are not "
                    "UTF-8: correct or remove it"
                )
        parts: list[str] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            for part in self._cut(text):
                parts.append(part)
                owners.append(owner)
        result: list[list[int]] = [[] for _ in texts]
        if parts:
            for owner, ids in zip(owners, self._encode(parts), strict=True):
                result[owner] += ids
        return result

    def _encode(self, parts: list[str]) -> list[list[int]]:
        """Ids of each text, without tokens that a tokenizer would add around it."""
        backend = self._backend
        if backend is not None and backend.padding is None and backend.truncation is None:  # which a call of the tokenizer may have set
            return [encoded.ids for encoded in backend.encode_batch_fast(parts, add_special_tokens=False)]
        encoded = self.tokenizer(
            parts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    def _cut(self, text: str) -> list[str]:
        parts: list[str] = []
        start = 0
        while match := self._protected.search(text, start):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        parts.append(text[start:])
        return [part for part in parts if part]


class CachedEncoder(TextEncoder):
    """A `TextEncoder` that keeps the ids of short texts: roles, frame headers and common questions repeat.

    At most `ENTRIES` are kept; then the cache is cleared.
    """

    LONGEST = 200
    ENTRIES = 1 << 16

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._known: dict[str, list[int]] = {}

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, tokenised by itself."""
        known = self._known
        missing = list(dict.fromkeys(text for text in texts if text not in known))
        fresh = dict(zip(missing, super().pieces(missing))) if missing else {}
        result = [fresh[text] if text in fresh else known[text] for text in texts]
        if len(known) + len(fresh) > self.ENTRIES:
            known.clear()
        known.update((text, ids) for text, ids in fresh.items() if len(text) <= self.LONGEST)
        return result
