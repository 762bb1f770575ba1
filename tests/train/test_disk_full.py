"""A disk without room, here a limit on file sizes: one message with the file and the next step, and nothing that was complete is lost."""

import errno
import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from eagle_train.config import ParallelConfig, dump_config
from eagle_train.data.ledger import Entry, Ledger
from eagle_train.distributed.world import start_world
from eagle_train.errors import disk_is_full
from eagle_train.training import checkpoint
from eagle_train.training.metrics import Metrics


@contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_names_the_disk_and_the_last_one(tmp_path):
    world = start_world(ParallelConfig(dtype="float32"), "cpu")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp1 = nn.Linear(300, 300)

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def write(step):
        return checkpoint.write(tmp_path, checkpoint.Progress(0, "s", step, step, False, {}), model, optimizer, world)

    with (
        file_size_limit(1 << 16),
        pytest.raises(checkpoint.WriteError, match=r"s-00000001 could not be written.*disk is full.*GiB.*command starts again") as raised,
    ):
        write(1)
    assert raised.value.on_every_rank  # every rank raises it; only the main one prints it
    kept = write(2)
    with file_size_limit(1 << 16), pytest.raises(checkpoint.WriteError, match=r"continues from s-00000002"):
        write(3)
    assert checkpoint.latest(tmp_path) == kept
    checkpoint.read(kept, model, optimizer, world)


def test_commands_name_the_file_and_continue(colour_run, tmp_path, eagle_here):
    (tmp_path / "run.yaml").write_text(dump_config(colour_run(rows=200)))
    with file_size_limit(4096):
        refused = eagle_here("prepare", tmp_path / "run.yaml")
    assert refused.returncode == 1
    assert "disk is full" in refused.stderr
    assert str(tmp_path / "runs/run/facts") in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "of its own" not in refused.stderr  # "this error has no message of its own"
    assert eagle_here("prepare", tmp_path / "run.yaml").returncode == 0


def test_writers_of_lines_name_their_file(tmp_path):
    for write in (
        lambda path: Ledger(path).extend([Entry("s", 1, "r", "x" * 9000)]),
        lambda path: Metrics(path).write({"kind": "step", "text": "x" * 9000}),
    ):
        with file_size_limit(4096), pytest.raises(OSError, match=r"lines\.jsonl") as raised:
            write(tmp_path / "lines.jsonl")
        assert disk_is_full(raised.value)
        (tmp_path / "lines.jsonl").unlink()


def test_an_export_names_its_file(tmp_path):
    from eagle_model.checkpoint import save_tensors

    with file_size_limit(4096), pytest.raises(OSError, match=r"weights\.safetensors: can't be written") as raised:
        save_tensors({"a": torch.zeros(10000)}, tmp_path / "weights.safetensors")
    assert disk_is_full(raised.value)


def test_what_says_that_a_disk_is_full():
    assert disk_is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert disk_is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    outer = ValueError("something else")
    outer.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert disk_is_full(outer)
    assert not disk_is_full(OSError(errno.ENOENT, "No such file or directory"))
    assert not disk_is_full(RuntimeError("os error 2"))
    outer.__context__ = outer  # no endless chain
    assert not disk_is_full(outer)
