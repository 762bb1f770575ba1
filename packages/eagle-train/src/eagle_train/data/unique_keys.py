"""Objects of JSON whose keys are written once; Python's reader takes the last of several."""

from __future__ import annotations

from typing import Any


class RepeatedKeyError(ValueError):
    """A key is written twice in an object; the message has the key."""


def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object: an `object_pairs_hook` of `json.loads`. Raises RepeatedKeyError."""
    result = dict(items)
    if len(result) != len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"key {twice!r} is written twice")
    return result
