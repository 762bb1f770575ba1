"""The packs of a step, with the same samples on every rank of a context parallel group, and the sums of the step.

Each rank of a group reads its share of a pack's tiles. A sample that one of them can't read must be missing for all, and then every share
of the pack's tiles is another one. The sums that a step needs anyway also count new missing samples; only if there are any do the ranks
compare and read that pack again without those samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from eagle_train.data.ledger import Entry
from eagle_train.loading.pack import LoadedPack

from .world import World


class Totals(NamedTuple):
    """Sums over all packs of a step, on every rank the same."""

    label_weight: float
    tokens: int
    tiles: int
    samples: int
    missing: int
    labels: int
    #: How many ranks got SIGINT and SIGTERM, whether the main rank requests a checkpoint after this step, and how many ranks failed to
    #: write the checkpoint in flight.
    interrupts: int = 0
    terminations: int = 0
    saves: int = 0
    broken: int = 0
    #: Damaged frames that are used as the decoder makes them (`on_damage: conceal`).
    concealed: int = 0


def agree(
    packs: Sequence[LoadedPack],
    world: World,
    read_again: Callable[[int, dict[int, Entry]], LoadedPack],
    requests: tuple[bool, bool, bool, bool] = (False, False, False, False),
) -> tuple[list[LoadedPack], Totals]:
    """The packs of a step with the same samples on every rank of their context group, and the step's sums; a collective of all ranks.

    read_again(place, missing): pack `place` of the step once more, without the samples `missing` (by place in the pack).
    requests: this rank's part of `interrupts`, `terminations`, `saves` and `broken`, which need no collective of their own.
    """
    packs = list(packs)
    agreed: list[dict[int, Entry]] = [{} for _ in packs]
    group = slice(world.rank - world.context.rank, world.rank - world.context.rank + world.context.size)
    while True:
        numbers = [[p.batch.label_weight, p.tokens, p.tile_count, len(p.sample_ids), len(p.missing), p.batch.num_kept] for p in packs]
        # float64 on the CPU (gloo): known before the first forward, and no device waits for it.
        # The ranks of a context group hold the same packs: the first of them counts.
        own = torch.tensor(numbers, dtype=torch.float64).sum(0) * (world.context.rank == 0)
        changed = sum(pack.missing.keys() != known.keys() for pack, known in zip(packs, agreed)) if world.context.size > 1 else 0
        # Each rank of a context group reads other frames: they are counted on all of them.
        concealed = sum(pack.concealed_frames for pack in packs)
        rest = torch.tensor([*requests, concealed, changed], dtype=torch.float64)
        weight, *counts, changed = world.sum(torch.cat([own, rest])).tolist()
        if not changed:
            return packs, Totals(weight, *map(int, counts))
        of_ranks = world.gather([pack.missing for pack in packs])[group]
        for place, known in enumerate(agreed):
            union = {number: entry for missing in reversed(of_ranks) for number, entry in missing[place].items()}
            if union.keys() != known.keys():
                agreed[place] = dict(sorted(union.items()))
                packs[place] = read_again(place, agreed[place])
