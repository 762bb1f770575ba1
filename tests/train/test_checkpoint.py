"""Checkpoints: whole or not there, whatever kills the writer; the keep rule; any optimizer state comes back bit for bit."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import nn

from eagle_train.config import ParallelConfig
from eagle_train.distributed.world import start_world
from eagle_train.training import checkpoint
from eagle_train.training.saving import Saver


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.mlp1 = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))


def make(width=4, seed=0):
    torch.manual_seed(seed)
    model = Net(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return model, optimizer


def step(model, optimizer):
    model.mlp1(torch.ones(2, model.mlp1[0].in_features)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def world():
    return start_world(ParallelConfig(dtype="float32"), "cpu")


def at(number, done=False, stage=0):
    return checkpoint.Progress(stage, f"s{stage}", number, number, done, {"tokens": number})


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path, world):
    straight, optimizer = make()
    for number in range(1, 6):
        step(straight, optimizer)
        if number == 3:
            path = checkpoint.write(tmp_path, at(3), straight, optimizer, world)
    other, other_optimizer = make(seed=1)
    assert checkpoint.read(path, other, other_optimizer, world) == at(3)
    for _ in range(2):
        step(other, other_optimizer)
    for a, b in zip(straight.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_the_end_of_a_stage_is_kept_and_holds_no_optimizer(tmp_path, world):
    model, optimizer = make()
    step(model, optimizer)
    for number in (1, 2, 3):
        checkpoint.write(tmp_path, at(number), model, optimizer, world)
    end = checkpoint.write(tmp_path, at(3, done=True), model, None, world)
    checkpoint.write(tmp_path, at(5, stage=1), model, optimizer, world)
    assert [path.name for path in checkpoint.keep_newest(tmp_path, 0, 2)] == ["s0-00000001"]
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["s0-00000002", "s0-00000003", "s0-end", "s1-00000005"]
    assert checkpoint.latest(tmp_path).name == "s1-00000005"
    fresh, fresh_optimizer = make(seed=2)
    assert checkpoint.read(end, fresh, fresh_optimizer, world).done
    assert not fresh_optimizer.state
    assert torch.equal(fresh.mlp1[0].weight, model.mlp1[0].weight)


def test_a_model_of_another_size_is_refused_with_the_folder(tmp_path, world):
    model, _ = make()
    path = checkpoint.write(tmp_path, at(1, done=True), model, None, world)
    with pytest.raises(checkpoint.CheckpointError, match="s0-end"):
        checkpoint.read(path, make(width=6)[0], None, world)
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint"):
        checkpoint.read(tmp_path, model, None, world)
    (path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match=r"s0-end: can't be read.*: a file in it ends too early\. .*remove that folder"):
        checkpoint.read(path, model, None, world)


def write_for_ever(folder):
    world = start_world(ParallelConfig(dtype="float32"), "cpu")
    model, optimizer = make(width=256)
    saver = Saver(folder, world, keep=1)
    for number in range(1, 10_000):
        step(model, optimizer)
        saver.save(at(number), model, optimizer)


def test_kill_9_at_any_moment_leaves_whole_checkpoints(tmp_path, world):
    context = multiprocessing.get_context("spawn")
    half_written = 0
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = context.Process(target=write_for_ever, args=(folder,))
        process.start()
        deadline = time.monotonic() + 150
        while not checkpoint.latest(folder) and time.monotonic() < deadline:
            time.sleep(0.01)
        while not list(folder.glob(".writing-*")) and time.monotonic() < deadline:
            pass
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        half_written += bool(list(folder.glob(".writing-*")))
        newest = checkpoint.latest(folder)
        model, optimizer = make(width=256, seed=3)
        progress = checkpoint.read(newest, model, optimizer, world)
        again, again_optimizer = make(width=256)
        for _ in range(progress.step):
            step(again, again_optimizer)
        assert torch.equal(again.mlp1[0].weight, model.mlp1[0].weight)
        checkpoint.clean(folder)
        assert not list(folder.glob(".writing-*"))
        assert checkpoint.latest(folder) == newest
    assert half_written, "no kill hit a writer; the test proves nothing"
