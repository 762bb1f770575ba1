"""The packs of the benchmark: one document of three lengths, and three mixtures."""

from __future__ import annotations

import random


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


PACKS = {
    "one document, 64K": lambda: one(65536),
    "one document, 128K": lambda: one(131072),
    "one document, 256K": lambda: one(262144),
    "32 documents of 4K": lambda: equal(131072),
    "log-normal, 128K": lambda: log_normal(131072),
    "video 128K + 200 short": lambda: video_and_short(131072 + 200 * 512),
}


def causal_pairs(lengths: list[int]) -> int:
    return sum(n * (n + 1) // 2 for n in lengths)
