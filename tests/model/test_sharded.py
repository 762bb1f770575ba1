"""FSDP2 over two ranks, layer by layer: one rank has tiles and the other none, and the gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist

from tests.support.packs import make_pack
from tests.support.ranks import run_on_ranks


def rank_pack(rank):
    """Rank 0 has two tiles of four tokens, rank 1 has text alone."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 100, (40,), generator=generator)
    if rank == 0:
        ids[4:12] = 100
    tiles = torch.randint(0, 256, (2 if rank == 0 else 0, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return make_pack(ids, tiles=tiles, targets=torch.randint(0, 100, (40,), generator=generator), denominator=80.0)


def step(model, rank):
    loss = model(rank_pack(rank)).loss
    loss.backward()
    return loss.item()


def sharded_step(model, mode):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    model.set_activation_checkpointing(mode)
    for layer in model.blocks():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = step(model, dist.get_rank())
    return loss, {name: parameter.grad.full_tensor().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_two_sharded_ranks(make_model, mode):
    model = make_model()
    answers = run_on_ranks(2, sharded_step, model, mode)
    expected = sum(step(model, rank) for rank in range(2))
    assert sum(loss for loss, _ in answers) == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        # FSDP2 averages over ranks by default.
        got = 2 * torch.from_numpy(answers[0][1][name])
        torch.testing.assert_close(got, parameter.grad, atol=1e-5 * max(1.0, parameter.grad.abs().max().item()), rtol=1e-4, msg=name)
