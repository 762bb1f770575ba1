"""What packs cost a GPU: FLOPs of a training step, from the model's configuration and what the stage trains.

Decoder layers cost in proportion to tokens, attention to pairs of tokens within a sample, the head to labels, the vision tower to tiles. A
pack of tiles alone costs 1.3 (8B), 2.4 (2B) and 6.3 (1B) times as much as a pack of as many tokens of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eagle_model.flops import ForwardFlops

from .packing import Packs

FP8_SPEEDUP = 1.45
"""How many times as fast products of 8-bit floats are, rounding included. From a step of the 8B at 32K, which is 1.21 times as fast with
them in the decoder (recompute; 1.19 with selective; one H200, 2026-11-28); its linear layers are 56 % of the FLOPs there."""


class Work(NamedTuple):
    """What samples (or trees, or packs) consist of, float64 [N] each: tokens, pairs of a query and a key that it sees, labels, tiles."""

    tokens: np.ndarray
    pairs: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray

    def joined(self, offsets: np.ndarray) -> Work:
        """Sums over offsets[i]:offsets[i + 1]."""
        return Work(*(_sums(column, offsets) for column in self))


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a training step (forward and backward, without recomputation) for one token, pair, label and tile."""

    token: float
    pair: float
    label: float
    tile: float

    def of(self, work: Work) -> np.ndarray:
        """FLOPs of each sample, float64 [N]."""
        return self.token * work.tokens + self.pair * work.pairs + self.label * work.labels + self.tile * work.tiles


def cost_model(flops: ForwardFlops, modes: Mapping[Any, str], fp8: Mapping[Any, str] | None = None) -> CostModel:
    """The costs of a stage that trains the parts as `modes` says (`full`, `lora` or `frozen`, by part).

    The backward of a linear layer takes as many FLOPs as its forward for the gradient of its input, and as many again for that of its
    weight. A frozen weight (also under an adapter) has no gradient, and a frozen vision tower no backward.
    fp8: recipes of `model.fp8` by part: costs are then FLOPs of bfloat16 that take the same time, for predictions of time. Packs are
    balanced, and MFU is counted, without it.
    """
    vision, connector, language = (modes.get(part, "frozen") for part in ("vision", "connector", "language"))
    decoder = 3.0 if language == "full" else 2.0
    tower = {"full": 3.0, "lora": 2.0, "frozen": 1.0}[vision]
    bridge = 3.0 if connector == "full" else 2.0 if connector == "lora" or vision != "frozen" else 1.0

    def products(part: str, passes: float) -> float:
        """What `passes` products of a linear layer (output, gradients of input and weight) cost."""
        recipe = (fp8 or {}).get(part)
        exact = passes if recipe is None else float(recipe == "rowwise_with_gw_hp" and modes.get(part) == "full")
        return exact + (passes - exact) / FP8_SPEEDUP

    return CostModel(
        token=products("language", decoder) * flops.token,
        pair=3.0 * flops.pair,
        label=decoder * flops.label,
        tile=tower * (flops.tile - flops.tile_linear)
        + products("vision", tower) * flops.tile_linear
        + products("connector", bridge) * flops.connector,
    )


def work_of(trees: Packs, tokens: np.ndarray, labels: np.ndarray, tiles: np.ndarray, shared: np.ndarray) -> Work:
    """The work of each tree (or sample alone): its rows share `shared` tokens and all tiles, which are computed once.

    trees: rows of each tree as indices into the columns. tokens, labels, tiles, shared: of the rows, int64 [S].
    """
    offsets, rows = trees
    first = rows[offsets[:-1]]
    tokens, labels = tokens[rows].astype(np.float64), labels[rows].astype(np.float64)
    repeats = np.diff(offsets) - 1.0
    once = shared[first].astype(np.float64)
    return Work(
        _sums(tokens, offsets) - repeats * once,
        _sums(tokens * (tokens + 1) / 2, offsets) - repeats * (once * (once + 1) / 2),
        _sums(labels, offsets),
        tiles[first].astype(np.float64),
    )


def spread(costs: np.ndarray, packs_per_step: int, groups: int) -> float:
    """How much longer steps take than with perfectly balanced data groups, as a fraction: 0.05 means that 5 % of the time is waiting.

    costs: of the packs in the order of the plan, a whole number of steps, each sorted as `order_steps` does. The groups wait for one
    another at every pack (FSDP gathers and reduces layer by layer), so a micro-step takes as long as its costliest pack.
    """
    if not len(costs):
        return 0.0
    together = costs.reshape(-1, packs_per_step // groups, groups)
    return float(together.max(axis=2).sum() / max(together.mean(axis=2).sum(), 1e-9) - 1)


def group_seconds(costs: np.ndarray, packs_per_step: int, groups: int, rate: float) -> np.ndarray:
    """Seconds of each step, float64 [steps], of data groups with `rate` FLOP/s each; arguments as in `spread`."""
    return costs.reshape(-1, packs_per_step // groups, groups).max(axis=2).sum(axis=1) / rate


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return total[offsets[1:]] - total[offsets[:-1]]
