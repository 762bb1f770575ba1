"""Rows of a source that show the same media, as trees: the media are in a pack once, and the rows are branches (`packing.share_media`).

`facts.media_group` names what rows have in common: their media with clip bounds, and the prompt through the last medium (the system message
and all text before it). The frames and tiles of a group are those of its tightest row, so every row of it fits on its own."""

from collections import Counter

import numpy as np

from eagle_model.visual import VisualPlans
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


class GroupTexts:
    """The text tokens with which the rows of groups are planned: those of the longest text among the rows that fit on their own, and tokens
    that media leave free. A row that does not fit on its own changes nothing for the others.

    text: int64 [N], what rows have; status: of their own plans. reserve: tokens of the context that are kept free at most for the further
    rows of a group. Media that fill the context with one question leave no room for a second, and would be in as many packs as they have
    rows.
    """

    def __init__(self, text: np.ndarray, status: np.ndarray, groups: np.ndarray, reserve: int) -> None:
        #: bool [N], rows that are planned with the others of their group.
        self.member = (status == 0) & (groups >= 0)
        self._text, self._groups = text, groups[self.member]
        self._longest, total = (np.zeros(groups.max(initial=-1) + 1, np.int64) for _ in range(2))
        np.maximum.at(self._longest, self._groups, text[self.member])
        np.add.at(total, self._groups, text[self.member])
        self._room = np.minimum(total - self._longest, reserve)

    def texts(self) -> np.ndarray:
        """Text tokens of each row, int64 [N]."""
        planned = self._text.copy()
        planned[self.member] = (self._longest + self._room)[self._groups]
        return planned

    def give_up_room(self, status: np.ndarray) -> bool:
        """Groups with a row that does not fit any more, by the `status` of plans with `texts()`, keep nothing free; whether one did."""
        too_long = self._groups[status[self.member] != 0]
        found = bool(self._room[too_long].any())
        self._room[too_long] = 0
        return found


def media_tokens(facts: Facts, plans: VisualPlans, rows: np.ndarray | None = None) -> np.ndarray:
    """Tokens of each row (or of some) that are of its media, with the text around frames and tiles: what the rows of a group share."""
    text = facts.column("text_tokens")
    return plans.tokens - text if rows is None else plans.tokens[rows] - text[rows]


def make_trees(
    rows: np.ndarray, groups: np.ndarray | None, tokens: np.ndarray, shared: np.ndarray | None, capacity: int
) -> tuple[Packs, np.ndarray]:
    """The drawn `rows` as items for the packer: trees, and rows alone; and the tokens of each item.

    rows: int64 [S], a row as often as it is drawn; a row is in a tree once. groups, tokens, shared: of all rows of the facts. A tree of
    rows with `n_i` tokens of which `V` are shared has `V + sum(n_i - V)`; a group that is longer than `capacity` becomes several trees,
    with them. Items are in the order of their first row; without groups (groups and shared are None) they are the rows."""
    item = np.arange(len(rows))
    lengths = tokens[rows].astype(np.int64)
    together = item[:0] if groups is None else np.flatnonzero(groups[rows] >= 0)
    if groups is None or shared is None or not len(together):
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
