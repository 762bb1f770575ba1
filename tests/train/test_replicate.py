"""HSDP on four ranks (two replicas of two shards): the steps of plain FSDP2, equal replicas, and checkpoints that either reads."""

import os

import pytest
import torch
import torch.distributed as dist

from eagle_train.config import ConfigError, ParallelConfig, parse_config
from eagle_train.distributed.sharding import shard_model
from eagle_train.distributed.world import for_evaluation, start_world
from eagle_train.training import checkpoint
from tests.support.models import tiny_model
from tests.support.packs import make_pack
from tests.support.ranks import run_on_ranks

WAYS = {"fsdp": ParallelConfig(dtype="float32"), "hsdp": ParallelConfig(dtype="float32", replicate=2)}


def world_of(parallel):
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    return start_world(parallel, "cpu")


def pack_of(rank):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 100, (30,), generator=generator)
    ids[4:8] = 100
    tiles = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return make_pack(ids, tiles=tiles, targets=torch.randint(0, 100, (30,), generator=generator), denominator=120.0)


def train(parallel, world, start, steps):
    model = shard_model(tiny_model(seed=start), world, parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    numbers = []
    for _ in range(steps):
        loss = model(pack_of(world.rank)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        numbers.append((world.sum(loss.detach().double()).item(), norm.full_tensor().item()))
    return model, optimizer, numbers


def compare(folder):
    """Numbers and weights of both ways, where the first shard lies, and the weights that plain FSDP2 reads from the other's checkpoint."""
    result = {}
    for way, parallel in WAYS.items():
        world = world_of(parallel)
        model, optimizer, numbers = train(parallel, world, 0, 3)
        weight = model.language_model.model.embed_tokens.weight
        whole = {name: parameter.full_tensor().detach().numpy() for name, parameter in model.named_parameters()}
        result[way] = numbers, whole, weight.to_local().detach().numpy(), weight.device_mesh.shape
        progress = checkpoint.Progress(0, way, 3, 3, False, {})
        path = checkpoint.write(folder, progress, model, optimizer, world)
        if way == "hsdp":
            other, other_optimizer, _ = train(WAYS["fsdp"], world, 1, 1)
            checkpoint.read(path, other, other_optimizer, world)
            result["read"] = {name: parameter.full_tensor().detach().numpy() for name, parameter in other.named_parameters()}
    return result


def test_four_ranks_with_two_replicas_are_four_ranks_without(tmp_path):
    answers = run_on_ranks(4, compare, tmp_path)
    for answer in answers:
        numbers, whole, _, _ = answer["fsdp"]
        others, theirs, _, mesh = answer["hsdp"]
        assert mesh == (2, 2)
        for (loss, norm), (other, other_norm) in zip(numbers, others, strict=True):
            assert other == pytest.approx(loss, rel=1e-6)
            assert other_norm == pytest.approx(norm, rel=1e-5)
        for name, tensor in whole.items():
            torch.testing.assert_close(torch.from_numpy(theirs[name]), torch.from_numpy(tensor), atol=1e-6, rtol=1e-5, msg=name)
            assert (answer["read"][name] == theirs[name]).all(), name
    shards = [answer["hsdp"][2] for answer in answers]
    assert (shards[0] == shards[2]).all(), "the replicas hold the same shards"
    assert (shards[1] == shards[3]).all()
    assert shards[0].shape[0] == 2 * answers[0]["fsdp"][2].shape[0]


def test_numbers_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"parallel.replicate is 2, which does not divide the 3 ranks"):
        start_world(ParallelConfig(replicate=2), "cpu")
    with pytest.raises(ConfigError, match=r"replicate \(2\) is for sharded parameters, and fsdp: false replicates all of them"):
        parse_config({"parallel": {"replicate": 2, "fsdp": False}})
    assert for_evaluation(ParallelConfig(replicate=2)).replicate == 1


def groups_of_models():
    """Process groups that exist after each of three models, as in a run of three stages, for every way."""
    found = {}
    for way, parallel in (WAYS | {"replicated": ParallelConfig(dtype="float32", fsdp=False)}).items():
        world, found[way] = world_of(parallel), []
        for seed in range(3):
            shard_model(tiny_model(seed=seed), world, parallel)
            found[way].append(len(dist.distributed_c10d._world.pg_map))
    return found


def test_the_models_of_all_stages_share_process_groups():
    [found, *_] = run_on_ranks(4, groups_of_models)
    assert all(first == second == third for first, second, third in found.values()), found
