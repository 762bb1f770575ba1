"""What the ranks of a context group do with one pack: each reads its share of the tiles and computes its share of the tokens.

A sample that one of them can't read must be missing for all, and then every share of the pack's tiles is another one. The sums that a
step needs anyway tell that somebody has news; only then do the ranks compare and read that pack again without the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle_cp import Layout, TilePlan, plan_tiles
from eagle_model.prompt import IGNORE_INDEX
from eagle_train.data.ledger import Entry

from .batch import Batch
from .parallel import World


class Totals(NamedTuple):
    """Sums over all packs of a step, on every rank the same."""

    label_weight: float
    tokens: int
    tiles: int
    samples: int
    missing: int
    labels: int


def agree(batches: Sequence[Batch], world: World, read_again: Callable[[int, dict[int, Entry]], Batch]) -> tuple[list[Batch], Totals]:
    """The batches of a step with the same samples on every rank of their context group, and the step's sums; a collective of all ranks.

    read_again(place, missing): batch `place` of the step once more, without the samples `missing` (by place in the pack).
    """
    batches = list(batches)
    agreed: list[dict[int, Entry]] = [{} for _ in batches]
    group = slice(world.rank - world.context.rank, world.rank - world.context.rank + world.context.size)
    while True:
        numbers = [[b.label_weight, b.tokens, b.tile_count, len(b.sample_ids), len(b.missing), b.num_kept] for b in batches]
        # float64 on the CPU (gloo): known before the first forward, and no device waits for it.
        # The ranks of a context group hold the same packs: the first of them counts.
        mine = torch.tensor(numbers, dtype=torch.float64).sum(0) * (world.context.rank == 0)
        news = sum(batch.missing.keys() != known.keys() for batch, known in zip(batches, agreed)) if world.context.size > 1 else 0
        weight, *counts, news = world.sum(torch.cat([mine, torch.tensor([news], dtype=torch.float64)])).tolist()
        if not news:
            return batches, Totals(weight, *map(int, counts))
        told = world.gather([batch.missing for batch in batches])[group]
        for place, known in enumerate(agreed):
            union = {number: entry for missing in reversed(told) for number, entry in missing[place].items()}
            if union.keys() != known.keys():
                agreed[place] = dict(sorted(union.items()))
                batches[place] = read_again(place, agreed[place])


class Share(NamedTuple):
    """What one rank computes of a pack: tensors that the model's forward takes by these names, and its arguments on the host."""

    fields: dict[str, Tensor]
    layout: Layout
    num_kept: int
    tile_plan: TilePlan | None


def shares(batch: Batch, world: World, described: Any) -> Share:
    """What this rank computes of a pack: all of it, or its part of the tokens and tiles."""
    names = ("input_ids", "position_ids", "targets", "token_weights")
    fields = {name: torch.from_numpy(getattr(batch, name)) for name in names}
    tiles = torch.from_numpy(batch.tiles)
    if world.context.size == 1:
        index = torch.from_numpy(batch.context_index)
        return Share(fields | {"tiles": tiles, "context_index": index}, Layout.single(batch.cu_seqlens), batch.num_kept, None)
    text = described.text_config
    layout = Layout.build(batch.cu_seqlens, world.context, num_heads=text.num_attention_heads, num_kv_heads=text.num_key_value_heads)
    is_feature = torch.zeros(layout.total, dtype=torch.bool)
    is_feature[torch.from_numpy(batch.context_index)] = True
    plan = plan_tiles(layout, is_feature, described.tokens_per_tile)
    fields = {name: layout.shard(value, fill=IGNORE_INDEX if name == "targets" else 0) for name, value in fields.items()}
    kept = int(((fields["targets"] != IGNORE_INDEX) & (fields["token_weights"] != 0)).sum())
    return Share(fields | {"tiles": tiles}, layout, kept, plan)
