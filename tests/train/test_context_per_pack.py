"""`parallel.context: auto`: every pack has its own split, the same on all ranks, and losses and gradients are those of one rank."""

import os
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from eagle_cp.planner import Hardware
from eagle_model.batch import PackedBatch
from eagle_train.config import ConfigError, ParallelConfig, parse_config
from eagle_train.distributed.world import start_world
from tests.support.models import tiny_model
from tests.support.packs import make_pack
from tests.support.ranks import Ranks

#: Packs, as lengths of samples and what each continues: alike and short, one long, long and short, uneven, trees.
PACKS = {
    "short": ([40] * 8, None),
    "one": ([333], None),
    "mixed": ([160, 12, 31, 9, 14], None),
    "two": ([90, 88], None),
    "trees": ([60, 20, 11, 17, 40], [-1, 0, 0, -1, -1]),
}
TILES = {"short": (0, 3, 5), "one": (0,), "mixed": (0, 0, 2), "two": (), "trees": (0, 4, 4)}
"""Samples that each tile is in."""


def make_batch(name: str) -> PackedBatch:
    lengths, prefixes = PACKS[name]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 100, (sum(lengths),), generator=generator)
    starts, used = [0, *accumulate(lengths)], dict.fromkeys(range(len(lengths)), 2)
    for sample in TILES[name]:
        first = starts[sample] + used[sample]
        ids[first : first + 4] = 100
        used[sample] += 5
    targets = torch.randint(0, 100, ids.shape, generator=generator)
    targets[::3] = -100
    weights = torch.rand(ids.shape[0], generator=generator, dtype=torch.float64)
    tiles = torch.randint(0, 256, (len(TILES[name]), 32, 32, 3), dtype=torch.uint8, generator=generator)
    denominator = torch.tensor(7.0, dtype=torch.float64)
    return make_pack(ids, lengths, tiles=tiles, targets=targets, token_weights=weights, denominator=denominator, prefixes=prefixes or ())


def gradients_of(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def step(model, name, layout_of):
    batch = make_batch(name)
    layout = layout_of(batch)
    part = batch.shard(layout, model.config.tokens_per_tile)
    if part.tile_plan is not None:
        part = replace(part, tiles=batch.tiles[part.tile_plan.first : part.tile_plan.last])
    loss = model(part, layout=layout).loss
    loss.backward()
    return loss.item(), {key: value.numpy() for key, value in gradients_of(model).items()}


def join(size):
    """A world of `size` ranks that share every pack."""
    import torch.distributed as dist

    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    parallel = ParallelConfig(ulysses=size // 2, all_gather=2, context="auto", dtype="float32")
    return start_world(parallel, "cpu"), tiny_model().double().train()


def shared_step(state, name, hardware):
    world, model = state
    world.chosen.clear()
    world.hardware = hardware
    loss, gradients = step(model, name, lambda batch: world.layout(batch.cu_seqlens, model.config.text_config, batch.prefixes))
    return loss, gradients, dict(world.chosen)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    with Ranks(request.param, lambda: join(request.param)) as group:
        yield group


#: Rates under which each level is the cheaper one for long samples of a tiny model.
HARDWARE = {"as measured": None, "slow kernels": Hardware(1e-4, 1e-4), "slow links": Hardware(host_gb_s=1e-3)}


def test_every_split_trains_what_one_rank_trains(ranks):
    model = tiny_model().double().train()
    chosen = set()
    for name in PACKS:
        expected, gradients = step(model, name, lambda batch: batch.layout())
        for hardware in HARDWARE.values():
            answers = ranks.call(shared_step, name, hardware)
            assert all(choice == answers[0][2] for _, _, choice in answers)
            chosen |= answers[0][2].keys()
            assert sum(loss for loss, _, _ in answers) == pytest.approx(expected, rel=1e-9)
            for key, gradient in gradients.items():
                total = sum(torch.from_numpy(answer[1][key]) for answer in answers)
                wanted = torch.from_numpy(gradient)
                torch.testing.assert_close(total, wanted, atol=1e-9 * max(1.0, wanted.abs().max().item()), rtol=1e-7, msg=f"{name} {key}")
    assert "whole samples" in chosen
    assert len(chosen) >= 3, chosen


def test_auto_needs_ranks_that_share():
    with pytest.raises(ConfigError, match=r"parallel: context is auto, and ulysses \* all_gather is 1"):
        parse_config({"parallel": {"context": "auto"}})
    assert parse_config({"parallel": {"context": "auto", "all_gather": 2}}).parallel.group_size == 2
