"""The packs of the benchmark: one document, three mixtures, each of any size, and three packs of trees."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple


def one(tokens: int) -> list[int]:
    return [tokens]


def equal(tokens: int, each: int = 4096) -> list[int]:
    return [each] * (tokens // each)


def log_normal(tokens: int, seed: int = 0) -> list[int]:
    """Median 1800 tokens, heavy tail, longest 32768: instruction data with some long documents."""
    draw, lengths = random.Random(seed), []
    while sum(lengths) < tokens:
        lengths.append(max(1, min(int(draw.lognormvariate(7.5, 1.2)), 32768)))
    lengths[-1] -= sum(lengths) - tokens
    return [n for n in lengths if n]


def video_and_short(tokens: int, video: int = 131072, short: int = 200, seed: int = 0) -> list[int]:
    """One long video and many short samples that fill the rest of `tokens`."""
    draw, rest = random.Random(seed), tokens - video
    weights = [draw.uniform(0.3, 1.7) for _ in range(short)]
    lengths = [max(1, int(rest * w / sum(weights))) for w in weights]
    lengths[0] += rest - sum(lengths)
    return [video, *lengths]


def packs(sizes: Sequence[int]) -> dict[str, Callable[[int], list[int]]]:
    """Lengths of the documents of every pack, by name: each is a function of the divisor of all lengths (1: as named)."""

    def divided(lengths: list[int]) -> Callable[[int], list[int]]:
        return lambda by: [max(1, n // by) for n in lengths]

    made: dict[str, list[int]] = {}
    for tokens in sizes:
        name = text(tokens)
        made[f"one document, {name}"] = one(tokens)
        made[f"{tokens // 4096} documents of 4K"] = equal(tokens)
        made[f"log-normal, {name}"] = log_normal(tokens)
        made[f"video {name} + 200 short"] = video_and_short(tokens + 200 * 512, video=tokens)
    return {name: divided(lengths) for name, lengths in made.items()}


def parse(size: str) -> int:
    """65536 from "64K"; raises ValueError for anything else than a multiple of 4096."""
    found = re.fullmatch(r"(\d+)([KM]?)", size)
    tokens = int(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found[2]] if found else 0
    if tokens < 4096 or tokens % 4096:
        raise ValueError(f"size of packs {size!r}: expected a multiple of 4096 tokens, such as 64K, 1M or 65536")
    return tokens


def text(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens % (1 << 20) == 0 else f"{tokens >> 10}K"


def causal_pairs(lengths: list[int]) -> int:
    return sum(n * (n + 1) // 2 for n in lengths)


class Trees(NamedTuple):
    """Prefixes with branches. lengths: of the documents of the pack, a prefix before its branches; prefixes: as `Layout` takes them."""

    lengths: list[int]
    prefixes: list[int]

    @classmethod
    def of(cls, prefixes: list[int], branches: int, tokens: int) -> Trees:
        """A tree of `branches` branches of `tokens` tokens on each prefix of the given lengths."""
        lengths, continued = [], []
        for length in prefixes:
            first = len(lengths)
            lengths += [length] + [tokens] * branches
            continued += [-1] + [first] * branches
        return cls(lengths, continued)

    def separate(self) -> list[int]:
        """The same rows as documents of their own: prefix and branch each."""
        return [self.lengths[p] + n for n, p in zip(self.lengths, self.prefixes) if p >= 0]

    def pairs(self) -> int:
        """Attended pairs of one head."""
        shared = sum(n * self.lengths[p] for n, p in zip(self.lengths, self.prefixes) if p >= 0)
        return causal_pairs(self.lengths) + shared


TREES = {
    "1 prefix of 128K, 8 branches of 256": lambda: Trees.of([131072], 8, 256),
    "32 prefixes of 4K, 7 branches of 128": lambda: Trees.of([4096] * 32, 7, 128),
    "log-normal prefixes of 128K, 7 branches of 128": lambda: Trees.of(log_normal(131072), 7, 128),
}
