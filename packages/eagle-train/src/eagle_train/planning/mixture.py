"""Mixtures: the share of an epoch that each source has (`stages.mixture`), and which of its rows fill that share.

Shares are proportional to weight x size^(1/temperature), as in multilingual pre-training (arXiv 1901.07291, section 3.1, with 1/temperature
as its alpha), or stated as tokens of each source. A source is read in passes: each pass has all of its rows in an order of its own, and an
epoch continues where the one before it ended. So over any number of epochs the rows of a source are drawn equally often, up to one time
(of each copy that repeat_time makes), and the draws of an epoch follow from its number alone: resuming needs no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from eagle_train.config import MixtureConfig
from eagle_train.data.facts import Facts

from .packing import shuffled


class Pool(NamedTuple):
    """Rows of a source that fit a stage. weight: that of the mixture, or the tokens that it states. rows: int64 [N], of the facts; one that
    repeat_time repeats is there several times. costs: int64 [N], what each counts for the size of an epoch."""

    name: str
    weight: float
    rows: np.ndarray
    costs: np.ndarray


class SourceDraws(NamedTuple):
    """What a number of draws takes from a source. rows: those that fit. drawn: distinct ones. samples, tokens: with repetitions. share: of
    the tokens of all sources. passes: samples / rows. most: draws of the row that is drawn most often."""

    name: str
    rows: int
    drawn: int
    samples: int
    tokens: int
    share: float
    passes: float
    most: int


def draw_mixture(pools: Sequence[Pool], mixture: MixtureConfig, stage: str, seeds: Sequence[int], epoch: int) -> np.ndarray:
    """Rows of an epoch, int64 [S], in the pools' order, a row as often as it is drawn. seeds: of each pool.

    The costs of a pool's rows add up to its target, to less than the cost of one row. Raises ValueError for a source that has a share, by
    weight or by tokens, and no row that fits.
    """
    stated = {**(mixture.weights or {}), **(mixture.tokens or {})}
    for pool in pools:
        if not len(pool.rows) and pool.name in stated:
            raise ValueError(
                f"stage {stage}: mixture gives source {pool.name} a share, and none of its rows fits the stage; raise max_tokens, or "
                "take the source out of the mixture"
            )
    drawn = [
        draw(pool, target, seed, epoch) for pool, target, seed in zip(pools, targets(pools, mixture), seeds, strict=True) if len(pool.rows)
    ]
    return np.concatenate([np.zeros(0, np.int64), *drawn])


def targets(pools: Sequence[Pool], mixture: MixtureConfig) -> list[int]:
    """The size of each pool's part of an epoch, in tokens or samples."""
    if mixture.tokens is not None:
        return [round(pool.weight) for pool in pools]
    sizes = [int(pool.costs.sum()) for pool in pools]
    # Decimal: a power of floats may differ in its last bit from one machine to another, and with it the plan.
    power = Decimal(0) if mixture.temperature is None else 1 / Decimal(repr(mixture.temperature))
    scores = [Decimal(repr(pool.weight)) * Decimal(size) ** power if size else Decimal(0) for pool, size in zip(pools, sizes)]
    total = sum(scores)
    whole = mixture.size if mixture.size is not None else sum(sizes)
    return [round(whole * score / total) if total else 0 for score in scores]


def draw(pool: Pool, target: int, seed: int, epoch: int) -> np.ndarray:
    """Rows of the pool from place `epoch * target` to `(epoch + 1) * target` of its endless sequence of passes, rising, int64."""
    size = int(pool.costs.sum())
    begin, end = epoch * target, (epoch + 1) * target
    first, last = begin // size, max(begin, end - 1) // size
    parts = [np.repeat(np.arange(len(pool.rows)), max(last - first - 1, 0))]  # passes that lie inside of the epoch
    for number in {first, last}:
        order = shuffled(len(pool.rows), seed * 1_000_003 + number)
        costs = pool.costs[order]
        starts = np.cumsum(costs) - costs
        parts.append(order[(starts >= begin - number * size) & (starts < end - number * size)])
    return pool.rows[np.sort(np.concatenate(parts))]


def count_draws(facts: Facts, tokens: np.ndarray, fits: np.ndarray, drawn: np.ndarray) -> list[SourceDraws]:
    """What the draws `drawn`, int64 [S] rows of the facts, take from each source that they use. tokens, fits: of every row of the facts."""
    result = []
    ordered = np.sort(drawn)
    whole = int(tokens[ordered].sum())
    for source in facts.sources:
        stop = source.first + source.rows
        mine = ordered[np.searchsorted(ordered, source.first) : np.searchsorted(ordered, stop)]
        if not len(mine):
            continue
        times = np.bincount(mine - source.first)
        rows, used = int(np.count_nonzero(fits[source.first : stop])), int(tokens[mine].sum())
        share, passes = used / max(whole, 1), len(mine) / max(rows, 1)
        result.append(SourceDraws(source.name, rows, int(np.count_nonzero(times)), len(mine), used, share, passes, int(times.max())))
    return result
