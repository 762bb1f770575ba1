"""Sums of gradients over the packs of a step: in float32, sharded, equal to the gradients of the packs one by one."""

import os

import pytest
import torch
import torch.distributed as dist

from eagle_train.config import ParallelConfig
from eagle_train.distributed.sharding import is_sharded, replicas_of, shard_model
from eagle_train.distributed.world import start_world
from eagle_train.training.gradients import Gradients
from tests.support.models import tiny_model
from tests.support.packs import make_pack
from tests.support.ranks import run_on_ranks

WAYS = {
    "sharded": ParallelConfig(dtype="bfloat16"),
    "replicas of shards": ParallelConfig(dtype="bfloat16", replicate=2),
    "replicated": ParallelConfig(dtype="bfloat16", fsdp=False),
}
PACKS = 3


def pack_of(rank, place):
    generator = torch.Generator().manual_seed(10 * rank + place)
    ids = torch.randint(0, 100, (30,), generator=generator)
    ids[4:8] = 100
    tiles = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return make_pack(ids, tiles=tiles, targets=torch.randint(0, 100, (30,), generator=generator), denominator=90.0)


def tensors(model, attribute="grad"):
    whole = {name: getattr(parameter, attribute) for name, parameter in model.named_parameters()}
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().float() for name, value in whole.items()}


def one_by_one(ranks):
    """Float32 sums of the bfloat16 gradients of every pack alone."""
    sums = {}
    for rank in range(ranks):
        for place in range(PACKS):
            model = tiny_model(seed=0).bfloat16()
            model(pack_of(rank, place)).loss.backward()
            sums = {name: value + sums.get(name, 0) for name, value in tensors(model).items()}
    return sums


def step(model, gradients, rank):
    """A step without an optimizer; the elements of gradients that were held between its packs."""
    held = []
    for place in range(gradients.packs):
        gradients.begin(place)
        model(pack_of(rank, place)).loss.backward()
        found = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters() if p.grad is not None]
        held.append(sum(tensor.numel() for tensor in found))
    return held


def on_ranks():
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    answers = {}
    for way, parallel in WAYS.items():
        for weights in (torch.float32, torch.bfloat16):
            world = start_world(parallel, "cpu")
            model = shard_model(tiny_model(seed=0).to(weights), world, parallel)
            gradients = Gradients(model, PACKS, replicas_of(parallel, size))
            for _ in range(2):  # nothing of the first step is in the second
                model.zero_grad(set_to_none=True)
                held = step(model, gradients, rank)
            local = sum(parameter.to_local().numel() for parameter in model.parameters())
            dtypes = {parameter.grad.dtype for parameter in model.parameters()}
            whole = {name: value.numpy() for name, value in tensors(model).items()}
            gradients.close()
            answers[way, str(weights)] = whole, held, local, dtypes
            model.zero_grad(set_to_none=True)  # as a stage of one pack a step that follows
            after = Gradients(model, 1, replicas_of(parallel, size))
            step(model, after, rank)
            assert {parameter.grad.dtype for parameter in model.parameters()} == {weights}
            after.close()
    return answers


def test_sums_on_four_ranks_are_those_of_packs_one_by_one():
    expected = one_by_one(4)
    for answers in run_on_ranks(4, on_ranks):
        for (way, weights), (whole, held, local, dtypes) in answers.items():
            for name, value in expected.items():
                error = (torch.from_numpy(whole[name]) - value).norm() / value.norm().clamp(min=1e-6)
                # Float32 sums of bfloat16 gradients; replicas of bfloat16 weights round their sum once.
                assert error < 4e-3, (way, weights, name, error)
            if way == "sharded":
                assert dtypes == {torch.float32}
                assert held == [local] * PACKS, "only a shard is held between packs"


@pytest.mark.parametrize("packs", [1, PACKS])
def test_one_rank_with_bfloat16_weights_has_no_copies_and_sums_in_float32(packs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    parallel = ParallelConfig(dtype="bfloat16")
    world = start_world(parallel, "cpu")
    try:
        model = shard_model(tiny_model(seed=0).bfloat16(), world, parallel)
        assert not is_sharded(model)
        gradients = Gradients(model, packs, 1)
        step(model, gradients, 0)
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32 if packs > 1 else torch.bfloat16}
        if packs > 1:
            for name, value in one_by_one(1).items():
                if "embed_tokens" not in name:  # tied to the head: there are two gradients of each pack, rounded apart or together
                    assert torch.equal(tensors(model)[name], value), name
        gradients.close()
        assert is_sharded(shard_model(tiny_model(seed=0), world, parallel)), "float32 weights need copies"
    finally:
        world.close()
