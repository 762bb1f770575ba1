"""The model over two context ranks: losses and gradients add up to those of one process, tiles and all."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from eagle_cp import ContextMesh, Layout
from tests.support.packs import make_pack
from tests.support.ranks import run_on_ranks

LENGTHS = (70, 9, 30)
TILES = (5, 0, 2)


def make_batch(tiles):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 100, (sum(LENGTHS),), generator=generator)
    start = 0
    for length, count in zip(LENGTHS, tiles):
        ids[start + 3 : start + 3 + 4 * count] = 100
        start += length
    targets = torch.randint(0, 100, ids.shape, generator=generator)
    targets[::3] = -100
    weights = torch.rand(ids.shape[0], generator=generator, dtype=torch.float64)
    pixels = torch.randint(0, 256, (sum(tiles), 32, 32, 3), dtype=torch.uint8, generator=generator)
    denominator = torch.tensor(7.0, dtype=torch.float64)
    return make_pack(ids, LENGTHS, tiles=pixels, targets=targets, token_weights=weights, denominator=denominator)


def step(model, batch, layout):
    loss = model(batch, layout=layout).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def split_step(model, counts):
    mesh = ContextMesh.from_device_mesh(dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("all_gather", "ulysses")))
    batch = make_batch(counts)
    layout = Layout.build(batch.cu_seqlens, mesh, num_heads=4, num_kv_heads=2)
    batch = batch.shard(layout, 4)
    assert batch.tile_plan is not None
    batch = replace(batch, tiles=batch.tiles[batch.tile_plan.first : batch.tile_plan.last])
    loss, gradients = step(model, batch, layout)
    return loss, {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.parametrize("counts", [TILES, (1, 0, 0)], ids=["tiles on both ranks", "tiles on one"])
def test_two_ranks_add_up(make_model, counts):
    model = make_model().double()
    answers = run_on_ranks(2, split_step, model, counts)
    loss, gradients = step(model, make_batch(counts), None)
    assert sum(loss for loss, _ in answers) == pytest.approx(loss, rel=1e-9)
    for name, gradient in gradients.items():
        total = sum(torch.from_numpy(answer[1][name]) for answer in answers)
        torch.testing.assert_close(total, gradient, atol=1e-9 * max(1.0, gradient.abs().max().item()), rtol=1e-7, msg=name)
