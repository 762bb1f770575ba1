"""SIGINT and SIGTERM in real processes: a checkpoint after the running step, one and two ranks, and messages about what was saved."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from eagle_train.config import dump_config, load_config
from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import checkpoint
from eagle_train.training.metrics import Metrics, same_run
from eagle_train.training.stop import Interrupted, StopSignals
from eagle_train.training.trainer import Trainer
from tests.support.ranks import start_processes

STAGES = [
    {"name": "one", "max_tokens": 640, "steps": 300, "packs_per_step": 2, "lr": 1e-3},
    {"name": "two", "max_tokens": 1280, "steps": 2, "packs_per_step": 2, "lr": 1e-3},
]


def start(path, ranks=1, **environment):
    """`eagle train` as processes of their own, each the leader of its process group, as torchrun starts them."""
    command = [sys.executable, "-m", "eagle_train.cli", "train", str(path), "--device", "cpu"]
    return start_processes(command, ranks, stderr=subprocess.PIPE, COLUMNS="200", **environment)


def wait_for(condition, processes, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()
        time.sleep(0.02)


def steps_written(config):
    return sum(record["kind"] == "step" for record in Metrics(config.run.folder / "metrics.jsonl"))


def written(config, tmp_path):
    path = tmp_path / f"{config.run.name}.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.mark.parametrize(
    ("signum", "ranks", "workers"), [(signal.SIGINT, 1, 1), (signal.SIGTERM, 1, 0), (signal.SIGTERM, 2, 0), (signal.SIGINT, 2, 0)]
)
def test_a_signal_saves_after_the_running_step(colour_run, tmp_path, signum, ranks, workers):
    config = colour_run(stages=STAGES, checkpoint={"every": 1000}, loader={"workers": workers})
    processes = start(written(config, tmp_path), ranks)
    wait_for(lambda: steps_written(config) >= 3, processes)
    # The whole process group, as a terminal does; of two ranks only the second one, and the first must follow.
    os.killpg(processes[-1].pid, signum)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [128 + signum] * ranks, outputs
    progress = checkpoint.read_progress(checkpoint.latest(config.run.folder / "checkpoints"))
    assert 3 <= progress.step < 300
    assert steps_written(config) == progress.step
    message = f"stopped; the same command continues after step {progress.step} of stage one (checkpoint one-{progress.step:08d})"
    assert message in outputs[0][1]
    assert all("stopped" not in error for _, error in outputs[1:])
    assert not (config.run.folder / "ledger-train.jsonl").exists()  # no sample was lost with a worker

    # The same command continues there.
    again = start(tmp_path / "run.yaml", ranks)
    wait_for(lambda: steps_written(config) > progress.step, again)
    for process in again:
        os.killpg(process.pid, signal.SIGKILL)  # its reading processes too
    first, *others = [process.communicate()[1] for process in again]
    assert f"resuming from {config.run.folder}/checkpoints/one-{progress.step:08d}" in first
    assert "resuming" not in "".join(others), "the main rank prints"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_the_launcher_waits_for_its_ranks(colour_run, tmp_path, signum):
    """The signal of a terminal reaches the launcher alone: its ranks have sessions of their own."""
    config = colour_run(stages=STAGES, checkpoint={"every": 1000}, loader={"workers": 0})
    # Tests that run under nohup would hand down that the signal is ignored.
    heard = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", heard, "-m", "eagle_train.cli", "train", str(written(config, tmp_path)), "--device", "cpu"]
    command += ["--nproc", "2"]
    processes = start_processes(command, 1, stderr=subprocess.PIPE, COLUMNS="200")
    wait_for(lambda: steps_written(config) >= 3, processes)
    os.killpg(processes[0].pid, signum)
    _, error = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 128 + (signal.SIGTERM if signum == signal.SIGHUP else signum), error
    progress = checkpoint.read_progress(checkpoint.latest(config.run.folder / "checkpoints"))
    assert 3 <= progress.step < 300
    assert error.count("the same command continues after step") == 1
    assert "nothing was trained" not in error
    assert "Traceback" not in error


def test_a_stopped_and_continued_run_is_the_run_that_was_not(colour_run):
    torch.set_num_threads(1)
    straight, stopped = (colour_run(run={"name": name}) for name in ("straight", "stopped"))
    train(get_ready(straight), start_world(straight.parallel, "cpu"))

    def ask_for_a_stop(record):
        if record["total_step"] in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    def run():
        with StopSignals() as stop:
            train(get_ready(stopped), start_world(stopped.parallel, "cpu"), on_record=ask_for_a_stop, stop=stop)

    for where in ("after step 3 of stage one", "from the end of stage one"):
        with pytest.raises(Interrupted, match=f"the same command continues {where}") as caught:
            run()
        assert caught.value.signum == signal.SIGTERM
    run()
    assert same_run(Metrics(straight.run.folder / "metrics.jsonl")) == same_run(Metrics(stopped.run.folder / "metrics.jsonl"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_prepare_says_that_nothing_was_trained(colour_run, tmp_path, signum):
    config = colour_run(rows=300, stages=STAGES)
    processes = start(written(config, tmp_path))
    wait_for((config.run.folder / "facts").exists, processes)
    os.killpg(processes[0].pid, signum)
    _, error = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 128 + signum, error
    assert "interrupted; nothing was trained yet: the same command starts again" in error
    assert "Traceback" not in error
    assert steps_written(config) == 0


def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_repeated(colour_run):
    def trainer(name, on_evaluate, stop=None):
        config = colour_run(run={"name": name}, eval={"every": 2}, checkpoint={"every": 1000})
        ready = get_ready(config)
        world = start_world(config.parallel, "cpu")
        return Trainer(config, ready.schedules, ready.tokenizer, world, on_evaluate=on_evaluate, stop=stop)

    def score(model, stage):
        return {"sum": float(sum(parameter.detach().double().sum() for parameter in model.parameters()))}

    def interrupted(model, stage):
        os.kill(os.getpid(), signal.SIGINT)
        stopped.check_stop()
        return score(model, stage)

    straight = trainer("straight", score)
    straight.train()
    with StopSignals() as stop:
        stopped = trainer("stopped", interrupted, stop)
        with pytest.raises(Interrupted, match=r"continues after step 2 of stage one \(checkpoint one-00000002\)"):
            stopped.train()
    assert [record["kind"] for record in stopped.records.metrics] == ["step", "step"]
    again = trainer("stopped", score)
    again.train()
    assert same_run(again.records.metrics) == same_run(straight.records.metrics)


def test_a_second_interrupt_ends_at_once_and_says_what_was_saved(colour_run, tmp_path):
    """The step does not end, as in a collective whose other ranks are gone; the message reads what is on disk."""
    config = colour_run(stages=STAGES, checkpoint={"every": 2})
    script = tmp_path / "stuck.py"
    script.write_text(
        "import sys, time\n"
        "from eagle_train.config import load_config\n"
        "from eagle_train.distributed.world import start_world\n"
        "from eagle_train.runs.ready import get_ready\n"
        "from eagle_train.runs.train import train\n"
        "from eagle_train.training.stop import StopSignals, what_is_saved\n"
        "config = load_config(sys.argv[1])\n"
        "def stuck(record):\n"
        "    if record['total_step'] == 3:\n"
        "        print('stuck', flush=True)\n"
        "        while True: time.sleep(60)\n"
        "with StopSignals() as stop:\n"
        "    stop.describe = lambda: what_is_saved(config.run.folder, 'two', began=stop.training)\n"
        "    train(get_ready(config), start_world(config.parallel, 'cpu'), on_record=stuck, stop=stop)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(written(config, tmp_path))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "stuck\n"
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again ends the run at once" in error
    assert "ended at once; the same command continues after step 2 of stage one (checkpoint one-00000002)" in error


def test_checkpoints_by_minutes(colour_run):
    config = colour_run(checkpoint={"every": 1000, "minutes": 1e-6, "keep": 9})
    train(get_ready(config), start_world(config.parallel, "cpu"))
    names = [path.name for path in checkpoint.whole(config.run.folder / "checkpoints")]
    assert names == ["one-00000001", "one-00000002", "one-00000003", "one-end", "two-00000001", "two-end"]
    assert load_config(config.run.folder / "config.yaml").checkpoint.minutes == 1e-6
    never = colour_run(run={"name": "never"}, checkpoint={"every": 1000, "minutes": None})
    train(get_ready(never), start_world(never.parallel, "cpu"))
    assert [path.name for path in checkpoint.whole(never.run.folder / "checkpoints")] == ["one-end", "two-end"]
