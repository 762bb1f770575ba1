"""Packs in steps of equal numbers: steps are made whole, shuffled, and ordered by cost within.

Steps are groups of `packs_per_step` packs. The last step is made whole by splitting packs; only when every pack holds a single sample, and
none can be split, are some packs of an epoch empty.
"""

import numpy as np

from eagle_train.config import ConfigError, StageConfig

from .balance import deal_steps
from .packing import Packs, shuffled


def pack_costs(weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Cost of each pack, float64 [P], for the costs of its samples in pack order."""
    total = np.concatenate([[0.0], np.cumsum(weights)])
    return total[offsets[1:]] - total[offsets[:-1]]


def check_groups(stage: StageConfig, groups: int) -> None:
    """Raises ConfigError when the packs of a step can't be shared evenly by `groups` data-parallel groups, naming the numbers that can."""
    per_step = stage.packs_per_step
    if per_step % groups:
        lower, upper = per_step // groups * groups, -(-per_step // groups) * groups
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise ConfigError(
            f"stage {stage.name}: packs_per_step is {per_step}, which {groups} data-parallel groups can't share evenly; set it to {near}"
        )


def whole_steps(packs: Packs, lengths: np.ndarray, weights: np.ndarray, packs_per_step: int) -> Packs:
    """Split packs (the costliest first, samples dealt alternately) until steps are whole; add empty packs when samples run out."""
    while missing := -len(packs) % packs_per_step:
        counts = np.diff(packs.offsets)
        costs = np.where(counts > 1, pack_costs(weights[packs.items], packs.offsets), -1.0)
        split = np.argsort(-costs, kind="stable")[:missing]
        split = split[costs[split] > 0]
        if not len(split):
            return Packs(np.concatenate([packs.offsets, np.full(missing, packs.offsets[-1])]), packs.items)
        owner = np.repeat(np.arange(len(packs)), counts)
        for new, index in enumerate(split.tolist(), start=len(packs)):
            first, last = packs.offsets[index : index + 2]
            longest_first = first + np.argsort(-lengths[packs.items[first:last]], kind="stable")
            owner[longest_first[1::2]] = new
        items = packs.items[np.argsort(owner, kind="stable")]
        packs = Packs(np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(packs) + len(split)))]), items)
    return packs


def order_steps(packs: Packs, weights: np.ndarray, packs_per_step: int, seed: int, *, deal: bool = False) -> Packs:
    """Shuffle packs into steps; within a step the costliest pack comes first. deal: by `balance.deal_steps`."""
    order = shuffled(len(packs), seed + 1).reshape(-1, packs_per_step)
    costs = pack_costs(weights[packs.items], packs.offsets)
    if deal and len(order):
        order = deal_steps(order, costs, shuffled(len(packs), seed + 2))
    order = np.take_along_axis(order, np.argsort(-costs[order], axis=1, kind="stable"), axis=1).ravel()
    counts = np.diff(packs.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    return Packs(offsets, packs.items[np.repeat(packs.offsets[:-1][order], counts) + within])
