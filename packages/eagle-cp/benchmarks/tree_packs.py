"""Packs of trees next to the same rows as documents of their own, and next to a dense mask where it fits one GPU."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable
from functools import partial

import packs
import torch
import torch.distributed as dist
from measure import Shape, attempt, log

from benchmarks.results import Result, write
from benchmarks.rivals import Absent
from eagle_cp import ContextMesh


def dense_mask(trees: packs.Trees, shape: Shape):
    """Trees by one attention over the pack with a mask of T x T values, on one GPU: torch's memory-efficient kernel."""
    total = sum(trees.lengths)
    document = torch.arange(len(trees.lengths), device="cuda").repeat_interleave(torch.tensor(trees.lengths, device="cuda"))
    continued = torch.tensor(trees.prefixes, device="cuda")[document]
    place = torch.arange(total, device="cuda")
    mask = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    mask |= continued[:, None] == document[None]

    def step(q, k, v):
        # The kernel knows no groups of query heads.
        k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return step, shape.inputs(1, total, axis=-3)


def measure_trees(
    args: argparse.Namespace, result: Result, meshes: dict[int, ContextMesh], world: int, ours: Callable, shape: Shape
) -> None:
    """ours: makes the step of our attention from (lengths, mesh, backend, shape, prefixes)."""
    ways = {f"u={u} r={world // u}": mesh for u, mesh in meshes.items()} if world > 1 else {}
    for (name, make_trees), backend in itertools.product(packs.TREES.items(), ("flash-attn-4", "cudnn", "torch-flash")):
        trees = make_trees()
        rows = trees.separate()
        for way, mesh in {"one GPU": None, **ways}.items():
            ranks = 1 if mesh is None else world
            contenders = {
                f"trees, {way}, {backend}": (partial(ours, trees.lengths, mesh, backend, shape, trees.prefixes), trees.pairs()),
                f"separate rows, {way}, {backend}": (partial(ours, rows, mesh, backend, shape), packs.causal_pairs(rows)),
            }
            if mesh is None and backend == "torch-flash":
                contenders["dense mask, one GPU, torch"] = (partial(dense_mask, trees, shape), trees.pairs())
            for contender, (make, pairs) in contenders.items():
                if not re.search(args.packs, name) or not re.search(args.methods, contender):
                    continue
                found = attempt(make, pairs, ranks, args.seconds, shape)
                log(name, "|", contender, "|", found)
                if isinstance(found, str):
                    result.absent.append(Absent(name, contender, found))
                else:
                    result.add(name, contender, **found)
                if dist.get_rank() == 0 and args.out is not None:
                    write(result, args.out)  # a later pack may run out of time
