"""Which rows an epoch of a stage shows, and how often.

How often a row comes: `repeat_time` of its recipe entry (whole copies, and for the fractional part the same rows in every epoch),
times the source's weight (the stage's, else the recipe's; its fractional part is drawn anew in every epoch); or as `mixture` says.
"""

import zlib
from collections.abc import Iterator

import numpy as np

from eagle_model.visual import VisualPlans
from eagle_train.config import StageConfig
from eagle_train.data.errors import PrepareError
from eagle_train.data.facts import Facts, FactsSource

from .mixture import Pool, draw_mixture
from .packing import shuffled


def choose_rows(facts: Facts, stage: StageConfig, visual: VisualPlans, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that an epoch trains, int64 [S], in the facts' order, a row as often as it comes; and those that would be drawn and don't fit.

    With a mixture shares are of rows that fit, so that long rows don't make a source small."""
    if stage.mixture is None:
        drawn = draw_rows(facts, stage, seed, epoch)
        fits = visual.status[drawn] == 0
        return drawn[fits], np.unique(drawn[~fits])
    pools, seeds, dropped = [], [], [np.zeros(0, np.int64)]
    for source, weight, base in _sources_of(facts, stage, seed):
        rows = base + source.first
        fits = visual.status[rows] == 0
        dropped.append(np.unique(rows[~fits]))
        rows = rows[fits]
        costs = visual.tokens[rows].astype(np.int64) if stage.mixture.count == "tokens" else np.ones(len(rows), np.int64)
        pools.append(Pool(source.name, weight, rows, costs))
        seeds.append((seed * 1_000_003 + zlib.crc32(source.name.encode())) * 1_000_003 + zlib.crc32(stage.name.encode()))
    return draw_mixture(pools, stage.mixture, stage.name, seeds, epoch), np.concatenate(dropped)


def draw_rows(facts: Facts, stage: StageConfig, seed: int, epoch: int) -> np.ndarray:
    """Rows that an epoch of a stage without a mixture shows, int64 [S], in the facts' order, a row as often as it comes."""
    parts = [np.zeros(0, np.int64)]
    for source, weight, base in _sources_of(facts, stage, seed):
        name = zlib.crc32(source.name.encode())
        shown = _times(base, weight, ((seed * 1_000_003 + name) * 1_000_003 + zlib.crc32(stage.name.encode())) * 1_000_003 + epoch)
        parts.append(np.sort(shown) + source.first)
    return np.concatenate(parts)


def drawable_rows(facts: Facts, stage: StageConfig, seed: int) -> np.ndarray:
    """Rows that some epoch of the stage shows, int64."""
    shown = [
        base + source.first
        for source, weight, base in _sources_of(facts, stage, seed)
        if stage.mixture is not None or len(_times(base, weight, 0))
    ]
    return np.concatenate([np.zeros(0, np.int64), *shown])


def _sources_of(facts: Facts, stage: StageConfig, seed: int) -> Iterator[tuple[FactsSource, float, np.ndarray]]:
    """The stage's sources with their weights, and the rows that repeat_time makes of each, int64, counted within the source."""
    weights = stage.source_weights
    for source in facts.sources:
        weight = source.weight if weights is None else weights.get(source.name)
        if weight is not None and source.rows:
            rows = np.arange(source.rows, dtype=np.int64)
            yield source, weight, _times(rows, source.repeat_time, seed * 1_000_003 + zlib.crc32(source.name.encode()))


def _times(rows: np.ndarray, factor: float, seed: int) -> np.ndarray:
    """`rows` repeated `factor` times; the fractional part picks round(fraction * N) of them by hash, none twice."""
    whole = int(factor)
    some = round((factor - whole) * len(rows))
    picked = rows[shuffled(len(rows), seed)[:some]] if some else rows[:0]
    return np.concatenate([np.repeat(rows, whole), picked])


def nothing_to_train(facts: Facts, stage: StageConfig, visual: VisualPlans, seed: int) -> PrepareError:
    """The error of a stage without a step."""
    drawable = np.unique(drawable_rows(facts, stage, seed))
    return PrepareError(
        f"stage {stage.name}: none of {len(facts)} rows can be used ({np.count_nonzero(visual.status[drawable])} do not fit "
        f"{stage.max_tokens} tokens, {len(facts) - len(drawable)} are never drawn); raise max_tokens, or check the ledger and the "
        "stage's sources, their repeat_time and weight"
    )
