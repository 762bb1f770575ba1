"""A text encoder that remembers: roles, frame headers and common questions come again and again."""

from collections.abc import Sequence
from typing import Any

from eagle_model.prompt import TextEncoder


class CachedEncoder(TextEncoder):
    """A `TextEncoder` that keeps the ids of short texts (at most `ENTRIES`, then it starts anew)."""

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
