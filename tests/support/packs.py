"""Packed batches of tensors for tests of the model."""

from itertools import accumulate

import torch

from eagle_cp import Layout
from eagle_model import PackedBatch


def make_pack(input_ids, lengths=None, *, tiles=None, image=100, targets=None, token_weights=None, denominator=None, prefixes=()):
    """A `PackedBatch` of flat ids [T] (a tensor) of samples of these lengths (default: one sample).

    image: the id of visual tokens. targets: [T], or None for logits. token_weights: default 1. denominator: a number or None.
    prefixes: the sample that each one continues, or -1.
    """
    lengths = lengths or [len(input_ids)]
    weights = torch.ones(len(input_ids)) if token_weights is None else token_weights
    kept = torch.zeros(len(input_ids), dtype=torch.bool) if targets is None else (targets != -100) & (weights != 0)
    return PackedBatch(
        input_ids=input_ids,
        targets=targets,
        position_ids=Layout.single([0, *accumulate(lengths)], prefixes or None).position_ids(),
        token_weights=weights,
        cu_seqlens=(0, *accumulate(lengths)),
        tiles=tiles,
        visual_index=(input_ids == image).nonzero().squeeze(1),
        num_kept=int(kept.sum()),
        label_weight=float(weights[kept].sum()),
        denominator=None if denominator is None else torch.as_tensor(denominator),
        prefixes=tuple(prefixes),
    )


def image_pack(lengths, *, tiles=2):
    """A pack of random ids and targets for the model of `tiny_config()`: the first sample has an image of these tiles."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    ids = torch.randint(0, 100, (tokens,), generator=generator)
    ids[4 : 4 + 4 * tiles] = 100
    pixels = torch.randint(0, 256, (tiles, 32, 32, 3), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 100, (tokens,), generator=generator)
    return make_pack(ids, list(lengths), tiles=pixels, targets=targets, denominator=float(tokens))
