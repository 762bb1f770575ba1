"""Rows of a source that show the same media, as trees: the media are in a pack once, and the rows are branches (`packing.share_media`).

`facts.media_group` names what rows have in common: their media with clip bounds, and the prompt through the last medium (the system message
and all text before it). The frames and tiles of a group are those of its tightest row, so every row of it fits on its own."""

from collections import Counter

import numpy as np

from eagle_model.visual import VisualPlans, VisualSpec
from eagle_train.data.facts import Facts

from .packing import Packs


def media_groups(facts: Facts) -> np.ndarray:
    """The group of each row, int64 [N]; -1: a row that shares its media with no other row of its source."""
    keys = facts.column("media_group")
    groups = np.full(len(keys), -1, np.int64)
    found = 0
    for source in facts.sources:
        rows = slice(source.first, source.first + source.rows)
        _, inverse, counts = np.unique(keys[rows], return_inverse=True, return_counts=True)
        shared = (keys[rows] != 0) & (counts[inverse] > 1)
        groups[rows] = np.where(shared, inverse + found, -1)
        found += len(counts)
    return groups


def longest_texts(text: np.ndarray, status: np.ndarray, groups: np.ndarray) -> np.ndarray | None:
    """The text tokens that each row of a group is planned with, int64 [N]: those of the longest text among the rows that fit on their own.
    A row that does not fit changes nothing for the others. None: no row is in a group.

    text: int64 [N], what rows have; status: of their own plans."""
    member = (status == 0) & (groups >= 0)
    if not member.any():
        return None
    longest = np.zeros(groups.max() + 1, np.int64)
    np.maximum.at(longest, groups[member], text[member])
    planned = text.copy()
    planned[member] = longest[groups[member]]
    return planned


def visual_tokens(plans: VisualPlans, spec: VisualSpec) -> np.ndarray:
    """Tokens that a row shares with the others of its group at least: those of its tiles, [N]."""
    return plans.tiles * spec.tokens_per_tile


def make_trees(
    rows: np.ndarray, groups: np.ndarray | None, tokens: np.ndarray, shared: np.ndarray, capacity: int
) -> tuple[Packs, np.ndarray]:
    """The drawn `rows` as items for the packer: trees, and rows alone; and the tokens of each item.

    rows: int64 [S], a row as often as it is drawn; a row is in a tree once. groups, tokens, shared: of all rows of the facts. A tree of
    rows with `n_i` tokens of which `V` are shared has `V + sum(n_i - V)`; a group that is longer than `capacity` becomes several trees,
    with them. Items are in the order of their first row; without groups (None) they are the rows."""
    item = np.arange(len(rows))
    lengths = tokens[rows].astype(np.int64)
    together = item[:0] if groups is None else np.flatnonzero(groups[rows] >= 0)
    if groups is None or not len(together):
        return Packs(np.arange(len(rows) + 1), item), lengths
    seen: Counter[int] = Counter()
    open_trees: dict[tuple[int, int], tuple[int, int]] = {}  # group and occurrence of the row -> item and its tokens
    for place in together.tolist():
        row = int(rows[place])
        key = (int(groups[row]), seen[row])
        seen[row] += 1
        own = int(tokens[row] - shared[row])
        first, used = open_trees.get(key, (place, capacity))
        if used + own > capacity:
            open_trees[key] = place, int(tokens[row])
        else:
            item[place] = first
            lengths[first] = used + own
            open_trees[key] = first, used + own
    firsts, number = np.unique(item, return_inverse=True)
    order = np.argsort(number, kind="stable")
    return Packs(np.concatenate([[0], np.cumsum(np.bincount(number, minlength=len(firsts)))]), order), lengths[firsts]


def expand(packs: Packs, trees: Packs) -> tuple[Packs, np.ndarray]:
    """Packs of items as packs of the rows in them, and the item of each row in pack order, int64 [S]."""
    if len(trees) == len(trees.items):  # every item is a row
        return packs, packs.items
    sizes = np.diff(trees.offsets)[packs.items]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(ends[-1]) - np.repeat(ends[:-1], sizes)
    rows = trees.items[np.repeat(trees.offsets[:-1][packs.items], sizes) + within]
    return Packs(ends[packs.offsets], rows), np.repeat(packs.items, sizes)
