"""Checkpoints that are written while training goes on: the state as it was, complete or absent, and one error on every rank."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from eagle_train.config import ParallelConfig
from eagle_train.distributed.world import alone, start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import checkpoint
from eagle_train.training.checkpoint import WriteError
from eagle_train.training.metrics import Metrics, same_run
from eagle_train.training.saving import HostCopies, Saver
from tests.support.ranks import outputs_of, run_on_ranks, start_processes
from tests.train.test_checkpoint import at, make, step


def held_back(monkeypatch):
    """Names of checkpoints wait for this event: writing takes as long as the test wants."""
    go, publish = threading.Event(), checkpoint.publish
    monkeypatch.setattr(checkpoint, "publish", lambda *given: (go.wait(60), publish(*given))[1])
    return go


def test_what_is_written_is_the_state_at_the_time(tmp_path, monkeypatch):
    go, (model, optimizer) = held_back(monkeypatch), make()
    step(model, optimizer)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    saver = Saver(tmp_path, alone("cpu"), keep=2)
    saver.save(at(1), model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    assert checkpoint.latest(tmp_path) is None, "it has no name before everything is on disk"
    go.set()
    saver.wait()
    straight, straight_optimizer = make(seed=1)
    assert checkpoint.read(checkpoint.latest(tmp_path), straight, straight_optimizer, alone("cpu")) == at(1)
    for parameter, tensor in zip(straight.parameters(), expected):
        assert torch.equal(parameter, tensor)
    for _ in range(3):
        step(straight, straight_optimizer)
    for a, b in zip(straight.parameters(), model.parameters()):
        assert torch.equal(a, b)
    saver.close()


def test_copies_in_host_memory_are_allocated_once():
    """Every tensor of a nested state, by the same memory each time; a tensor of another shape gets its own."""
    copies, weight = HostCopies(pinned=False), torch.arange(6.0).view(2, 3)
    state = {"model": {"a": weight.t(), "b": torch.tensor(1, dtype=torch.int64)}, "groups": [{"lr": 0.1, "step": torch.tensor(2.0)}]}
    first = copies.stage(state)
    assert torch.equal(first["model"]["a"], weight.t())
    assert first["groups"] == [{"lr": 0.1, "step": torch.tensor(2.0)}]
    state["groups"][0]["lr"] = 0.2
    weight += 1
    assert torch.equal(first["model"]["a"], weight.t() - 1)
    assert first["groups"][0]["lr"] == 0.1
    place = first["model"]["a"].data_ptr()
    second = copies.stage(state | {"groups": []})
    assert second["model"]["a"].data_ptr() == place
    assert torch.equal(second["model"]["a"], weight.t())
    state["model"]["a"] = torch.zeros(4)
    assert copies.stage(state)["model"]["a"].shape == (4,)


def test_copies_of_several_dtypes_can_be_written(tmp_path):
    """They lie in one range of memory, and torch refuses to save storages that overlap with different dtypes."""
    state = {
        "weight": torch.arange(6.0).bfloat16(),
        "codes": torch.arange(9, dtype=torch.uint8),
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "scales": torch.arange(5.0),
    }
    copies = HostCopies(pinned=False)
    torch.save(copies.stage(state), tmp_path / "state.pt")
    for name, tensor in torch.load(tmp_path / "state.pt").items():
        assert torch.equal(tensor, state[name]), name
    assert (tmp_path / "state.pt").stat().st_size < 4096 * len(state), "not the whole range for every tensor"
    copies.close()


def test_one_is_in_flight_and_the_keep_rule_follows(tmp_path, monkeypatch):
    running, most, publish = [], [], checkpoint.publish

    def watched(folder, progress):
        running.append(progress.name)
        most.append(len(list(folder.glob(".writing-*"))))
        time.sleep(0.05)
        publish(folder, progress)
        running.remove(progress.name)

    monkeypatch.setattr(checkpoint, "publish", watched)
    model, optimizer = make()
    saver = Saver(tmp_path, alone("cpu"), keep=2)
    for number in range(1, 5):
        step(model, optimizer)
        saver.save(at(number), model, optimizer)
    saver.wait()
    assert most == [1] * 4
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["s0-00000003", "s0-00000004"]
    saver.close()


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_one_error_and_the_checkpoint_before_stays(tmp_path, monkeypatch, background):
    model, optimizer = make()
    saver = Saver(tmp_path, alone("cpu"), keep=1, background=background)
    step(model, optimizer)
    saver.save(at(1), model, optimizer)
    saver.wait()
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full_disk)

    def save():
        saver.save(at(2), model, optimizer)
        while not saver.broken:
            time.sleep(0.01)
        saver.wait()

    message = r"checkpoint s0-00000002 could not be written to .*No space left on device.*continues from s0-00000001"
    with pytest.raises(WriteError, match=message):
        save()
    assert [path.name for path in tmp_path.iterdir()] == ["s0-00000001"]
    other, other_optimizer = make(seed=1)
    assert checkpoint.read(tmp_path / "s0-00000001", other, other_optimizer, alone("cpu")) == at(1)
    saver.close()


def test_a_run_is_the_same_whenever_its_checkpoints_are_written(colour_run):
    torch.set_num_threads(1)
    records, tensors = [], []
    for background in (True, False):
        config = colour_run(run={"name": str(background)}, checkpoint={"every": 1, "keep": 1, "background": background})
        trainer = train(get_ready(config), alone("cpu")).trainer
        records.append(list(same_run(Metrics(config.run.folder / "metrics.jsonl"))))
        tensors.append(trainer.model.state_dict())
        assert [path.name for path in checkpoint.whole(trainer.checkpoints)] == ["one-00000003", "one-end", "two-00000001", "two-end"]
    assert records[0] == records[1]
    for name, tensor in tensors[0].items():
        assert torch.equal(tensors[1][name], tensor), name


def test_a_run_on_a_full_disk_ends_with_that_error_at_the_next_step(colour_run, monkeypatch):
    torch.set_num_threads(1)
    config = colour_run(checkpoint={"every": 2})
    ready = get_ready(config)
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full_disk)

    def started(trainer):
        done = []

        def failed():
            done.append(1)
            deadline = time.monotonic() + 60
            while len(done) == 3 and not trainer.saver.broken:  # steps are faster than the disk fails
                assert time.monotonic() < deadline
                time.sleep(0.01)

        trainer.after_step = failed

    with pytest.raises(WriteError, match=r"one-00000002 could not be written.*No space left.*the same command starts again"):
        train(ready, alone("cpu"), on_start=started)
    steps = [record["step"] for record in Metrics(config.run.folder / "metrics.jsonl") if record["kind"] == "step"]
    assert steps[-1] in (2, 3), "known at the latest one step after it failed"
    monkeypatch.undo()
    assert train(ready, alone("cpu")).trainer.total_steps == 6


def write_on_rank(folder):
    """Two checkpoints of a sharded model; the second can't be written by rank 1."""
    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    world = start_world(ParallelConfig(dtype="float32"), "cpu")
    model, _ = make(width=8)
    fully_shard(model.mlp1, mesh=dist.init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    saver = Saver(folder, world, keep=1)
    step(model, optimizer)
    saver.save(at(1), model, optimizer)
    step(model, optimizer)
    saver.wait()
    if rank == 1:
        from torch.distributed.checkpoint import filesystem

        filesystem._write_item = full_disk
    saver.save(at(2), model, optimizer)
    step(model, optimizer)
    try:
        saver.wait()
    except WriteError as error:
        return str(error)
    finally:
        saver.close()


def test_all_ranks_end_with_the_error_of_the_one_that_cannot_write(tmp_path):
    first, second = run_on_ranks(2, write_on_rank, tmp_path)
    assert first == second
    assert "checkpoint s0-00000002 could not be written" in first
    assert "No space left on device" in first
    assert [path.name for path in tmp_path.iterdir()] == ["s0-00000001"]
    alone_model, optimizer = make(width=8, seed=1)
    checkpoint.read(tmp_path / "s0-00000001", alone_model, optimizer, alone("cpu"))
    expected, expected_optimizer = make(width=8)
    step(expected, expected_optimizer)
    step(alone_model, optimizer)
    step(expected, expected_optimizer)
    for a, b in zip(alone_model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b)


KILLED = """
import os, sys, threading, time, torch, signal
import torch.distributed as dist
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from eagle_train.config import ParallelConfig
from eagle_train.distributed.world import start_world
from eagle_train.training.saving import HostCopies, Saver
from tests.train.test_checkpoint import at, make, step
torch.set_num_threads(1)
world = start_world(ParallelConfig(dtype="float32"), "cpu")
model, _ = make(width=8)
fully_shard(model.mlp1, mesh=dist.init_device_mesh("cpu", (2,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
saver = Saver(Path(sys.argv[1]), world, keep=1)
step(model, optimizer)
saver.save(at(1), model, optimizer)
saver.wait()
if world.rank == 1:
    from torch.distributed.checkpoint import filesystem
    filesystem._write_item = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
try:
    saver.save(at(2), model, optimizer)
    saver.wait()
finally:
    saver.close()
"""


def test_a_rank_that_is_killed_while_it_writes_hangs_no_other(tmp_path):
    processes = start_processes([sys.executable, "-c", KILLED, str(tmp_path)], 2)
    outputs = outputs_of(processes, timeout=100)
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode not in (0, None), outputs
    assert "lost another rank" in outputs[0] or "could not be written" in outputs[0] or "failed while the others" in outputs[0]
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["s0-00000001"]
