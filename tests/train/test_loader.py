"""The loader: the order of the tasks whatever the workers do, bounded bytes, and a stuck or dying reader costs one sample."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from eagle_model.prompt import CachedEncoder
from eagle_model.visual import VisualSpec
from eagle_sampling import Limits
from eagle_train.data.prepare import prepare
from eagle_train.loading import loader as loader_module
from eagle_train.loading.loader import Loader, LoaderError, Reading, Task, make_encoder, read
from eagle_train.planning.stages import StageSchedule

SPEC = VisualSpec(tile_size=32, tokens_per_tile=4)


@pytest.fixture
def tasks(colour_run, tokenizer):
    """Every pack of some epochs as a task, key = number."""
    config = colour_run()
    facts = prepare(config, tokenizer).facts
    schedule = StageSchedule(facts, config, config.stages[0], SPEC)
    result = []
    for epoch in range(3):
        plan = schedule.plan(epoch)
        for pack in range(plan.packs):
            result.append(Task(len(result), tuple(plan.samples(pack)), "token"))
    return result


@pytest.fixture
def reading(tasks, tmp_path):
    return Reading(str(tmp_path / "tokenizer"), SPEC, Limits())


@pytest.fixture
def pipes_hang(tmp_path, monkeypatch):
    """Reading processes do not refuse named pipes: opening one waits for a writer, as of a file of a server that does not answer."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import eagle_sampling.files\neagle_sampling.files.check_regular = lambda path: None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))


def here(tasks, reading, tokenizer):
    return list(Loader(tasks, reading, workers=0, encoder=CachedEncoder(tokenizer)))


def test_workers_give_what_the_process_itself_gives(tasks, reading, tokenizer):
    expected = here(tasks, reading, tokenizer)
    with Loader(tasks, reading, workers=2, prefetch=1 << 20) as loader:
        given = list(loader)
        assert loader.get() is None
    assert [key for key, _ in given] == list(range(len(tasks)))
    for (_, a), (_, b) in zip(expected, given):
        for name in ("input_ids", "targets", "position_ids", "tiles", "visual_index", "token_weights"):
            assert (getattr(a.batch, name) == getattr(b.batch, name)).all(), name
        for one, other in ((a.batch, b.batch),):
            assert (one.cu_seqlens, one.num_kept, one.label_weight) == (other.cu_seqlens, other.num_kept, other.label_weight)
        assert a.sample_ids == b.sample_ids


def test_no_more_is_read_ahead_than_the_bytes_allow(tasks, reading):
    requested = []

    def watched():
        for task in tasks:
            requested.append(task.key)
            yield task

    size = tasks[0].nbytes(SPEC)
    with Loader(watched(), reading, workers=1, prefetch=2 * size) as loader:
        key, batch = loader.get()
        deadline = time.monotonic() + 20
        while len(requested) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert key == 0
        assert 2 <= len(requested) <= 5
        assert loader.bytes_ahead <= 3 * size
        assert batch.batch.nbytes <= 1.5 * size
        assert len(list(loader)) == len(tasks) - 1


def kill_reader(loader, number, deadline):
    """Kill a reading process when it is at its first sample."""
    while loader._workers[number].place.value != 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    process = loader._workers[number].process
    os.kill(process.pid, signal.SIGKILL)
    while loader._workers[number].process is process and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.usefixtures("pipes_hang")
def test_a_reader_that_is_killed_once_costs_nothing(tasks, reading, tmp_path, caplog):
    task = next(task for task in tasks if task.pack[0].address.line <= 24)
    path = tmp_path / f"{task.pack[0].address.line - 1}.png"
    pixels = path.read_bytes()
    expected = read(task, make_encoder(reading.tokenizer), reading)
    path.unlink()
    os.mkfifo(path)  # reading it waits
    with Loader([task], reading, workers=1) as loader:
        while loader._workers[0].place.value != 0:
            time.sleep(0.02)
        time.sleep(0.2)
        path.unlink()
        path.write_bytes(pixels)
        kill_reader(loader, 0, time.monotonic() + 60)
        _, given = loader.get()
    assert not given.failed
    assert given.sample_ids == expected.sample_ids
    assert (given.batch.tiles == expected.batch.tiles).all()
    assert "is read again: the reading process ended with exit code -9" in caplog.text


FIRST_PROCESS = """
import multiprocessing, signal, time
from pathlib import Path
from eagle_train.loading.loader import _without_signals

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    with _without_signals():
        process.start()
    status = Path(f"/proc/{process.pid}/status").read_text()
    process.kill()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    print([bool(blocked & 1 << number - 1) for number in (signal.SIGINT, signal.SIGTERM)])
"""


def test_the_first_reading_process_ignores_signals_too(tmp_path):
    script = tmp_path / "first.py"
    script.write_text(FIRST_PROCESS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[True, True]"


@pytest.mark.usefixtures("pipes_hang")
def test_a_stuck_file_and_a_dying_reader_cost_one_sample_each(tasks, reading, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(loader_module, "SLOW_SAMPLE", 2.0)
    # A named pipe without a writer: opening it never returns.
    stuck = tasks[0].pack[0].address.line
    dying = tasks[1].pack[0].address.line
    for line in (stuck, dying):
        if (tmp_path / f"{line - 1}.png").exists():
            (tmp_path / f"{line - 1}.png").unlink()
        os.mkfifo(tmp_path / (f"{line - 1}.png" if line <= 24 else "clip.mp4.fifo"))
    begin = time.monotonic()
    with Loader(tasks[:2], reading, workers=2, stuck_after=8.0) as loader:
        for _ in range(2):  # a sample is tried a second time
            kill_reader(loader, 1, begin + 60)
        given = dict(loader)
    assert time.monotonic() - begin < 90
    for number, line, reasons in ((0, stuck, {"stuck"}), (1, dying, {"died", "stuck"})):
        [entry] = given[number].failed
        assert entry.line == line
        assert entry.reason in reasons
        assert len(given[number].sample_ids) == len(tasks[number].pack) - 1
    address = tasks[0].pack[0].address
    assert f"{address.source}:{stuck} (of {address.annotation}) is slow: " in caplog.text
    assert "is not used" in caplog.text


def test_a_reader_that_can_not_start_is_an_error_with_its_reason(tasks, reading):
    with Loader(tasks, reading._replace(tokenizer="/nowhere"), workers=1) as loader:
        with pytest.raises(LoaderError, match="nowhere"):
            loader.get()


def test_an_error_of_the_plan_reaches_the_consumer(tasks, reading):
    def broken():
        yield tasks[0]
        raise ValueError("no such step")

    with Loader(broken(), reading, workers=1) as loader:
        with pytest.raises(ValueError, match="no such step"):
            list(loader)


def test_bytes_are_estimated_from_above(tasks, reading, tokenizer):
    for task, (_, batch) in zip(tasks, here(tasks, reading, tokenizer)):
        assert np.isfinite(batch.batch.nbytes)
        assert batch.batch.nbytes <= task.nbytes(SPEC)
