"""How ranks are started: the command of torchrun, SLURM's variables, and what a user sees."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from eagle_train.cli import gpu_settings, launch, threads
from eagle_train.cli.gpu_settings import grow_segments, keep_kernels
from eagle_train.cli.ranks import cause, ending
from eagle_train.config import ConfigError


def test_first_host():
    for nodes, first in (
        ("gpu[03-07,9],other", "gpu03"),
        ("gpu03", "gpu03"),
        ("a-1,a-2", "a-1"),
        ("n[1,3]-ib", "n1-ib"),
        ("rack2-gpu[001-010]", "rack2-gpu001"),
    ):
        assert launch.first_host(nodes) == first


def test_slurm_tasks_join():
    slurm = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    environment = slurm | {"SLURM_STEP_NODELIST": "gpu[03-04]"}
    assert launch.join_slurm(environment)
    assert {key: value for key, value in environment.items() if not key.startswith("SLURM")} == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "23456",
    }
    assert launch.is_launched(environment)
    for alone in ({}, slurm | {"SLURM_NTASKS": "1"}, slurm | {"RANK": "0", "WORLD_SIZE": "2"}):
        assert not launch.join_slurm(dict(alone))


def test_torchrun():
    arguments = launch.without_launch_options(["train", "c.yaml", "--nproc", "4", "--set", "run.seed=1", "--nodes=2", "--rdzv", "h"])
    assert arguments == ["train", "c.yaml", "--set", "run.seed=1"]
    assert launch.torchrun(arguments, 4, 1, None, "r") == ["--nproc-per-node", "4", "--standalone", "-m", "eagle_train.cli", *arguments]
    several = launch.torchrun(arguments, 8, 2, "node1", "r")
    assert several[:10] == [
        "--nproc-per-node", "8", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29500", "--rdzv-id", "r",
    ]  # fmt: skip
    assert "node1:4000" in launch.torchrun(arguments, 8, 2, "node1:4000", "r")
    with pytest.raises(ConfigError, match=r"--nodes 2 needs --rdzv HOST"):
        launch.torchrun(arguments, 8, 2, None, "r")


@pytest.mark.parametrize(
    ("exitcode", "text", "code"),
    [(2, "", 2), (-9, "rank 3 was ended by SIGKILL; the host may", 137), (-11, "SIGSEGV. The", 139)],
)
def test_the_launcher_says_only_what_no_rank_could(exitcode, text, code):
    said, ended = ending(3, SimpleNamespace(exitcode=exitcode))
    assert (text in said, bool(said), ended) == (True, bool(text), code)


def test_a_rank_that_a_signal_ended_is_the_cause():
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in {0: 1, 1: -15, 5: -9, 6: 1}.items()}
    error = SimpleNamespace(failures=failures, get_first_failure=lambda: (0, failures[0]))
    assert cause(error) == (5, failures[5])
    del failures[5]
    assert cause(error) == (0, failures[0])


def test_a_process_per_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [launch.processes(None, None), launch.processes(None, "cpu"), launch.processes(2, None)] == [4, 1, 2]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.processes(None, None) == 1


def eagle(*arguments, folder):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "eagle_train.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_print_launch(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {name: my-run}")
    done = eagle("train", "c.yaml", "--print-launch", "slurm", "--nodes", "2", "--set", "stages.0.lr=1e-5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"#SBATCH --job-name=my-run", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8"} <= set(lines)
    assert lines[-1] == "srun eagle train c.yaml --set stages.0.lr=1e-5"
    assert eagle("train", "c.yaml", "--print-launch", "pbs", folder=tmp_path).returncode == 2


@pytest.mark.slow
def test_two_processes_train_a_run(colour_run, tmp_path):
    from eagle_train.config import dump_config
    from eagle_train.training.metrics import Metrics

    config = colour_run()
    (tmp_path / "c.yaml").write_text(dump_config(config))
    done = eagle("train", "c.yaml", "--device", "cpu", "--nproc", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    assert done.stdout.count("run folder:") == 1
    assert len(list(Metrics(config.run.folder / "metrics.jsonl"))) == 6
    wrong = eagle("train", "c.yaml", "--nproc", "2", "--set", "stages.0.lr=-1", folder=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.count("stages.0.lr") == 1


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(colour_run, tmp_path):
    from eagle_train.config import dump_config
    from eagle_train.distributed.world import start_world
    from eagle_train.runs.ready import get_ready
    from eagle_train.runs.train import train

    config = colour_run()
    train(get_ready(config), start_world(config.parallel, "cpu"))
    rows = dump_config(config).split("annotation: ")[1].split()[0]
    found = []
    for number in ("1", "2"):
        options = ("--device", "cpu", "--data", rows, "--limit", "6", "--json", "--nproc", number)
        done = eagle("eval", str(config.run.folder), *options, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    [one], [two] = (document["scores"] for document in found)
    assert one["questions"] == 6
    assert one["loss"] > 0
    assert two == pytest.approx(one)
    wrong = eagle("eval", str(config.run.folder), "--nproc", "2", "--set", "train.x=1", folder=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("--set 'train.x=1'")) == (2, 1)


def test_threads_sleep_while_they_wait():
    """What the OpenMP library of torch itself says when it is loaded; a setting of the user's stays."""
    code = "from eagle_train.cli.threads import sleep_while_waiting as s; s(); import torch"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | {"OMP_DISPLAY_ENV": "true"}, timeout=120
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr, done.stderr
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        environment = {name: "1"}
        threads.sleep_while_waiting(environment)
        assert environment == {name: "1"}


def test_every_verb_sets_it_before_torch_is_imported(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import os, sys\n"
        "import eagle_train.cli.app as app\n"
        "app.command = lambda: lambda **_: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "from eagle_train.cli.main import main\n"
        "main(['plan', 'run.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "PASSIVE False\n", done.stderr


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 10)
    for given, processes, expected in (({}, 4, "2"), ({}, 16, "1"), ({"OMP_NUM_THREADS": "7"}, 2, "7")):
        environment = dict(given)
        threads.share_cores(processes, environment)
        assert environment == {"OMP_NUM_THREADS": expected}


def test_segments_of_gpu_memory_grow_unless_torch_is_told_otherwise():
    environment = {}
    grow_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:512"}
        grow_segments(environment)
        assert environment == {name: "max_split_size_mb:512"}


def test_kernels_of_flash_attn_4_are_kept_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_settings, "find_spec", lambda name: object())
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    keep_kernels(environment)
    folder = tmp_path / "eagle/flash-attn-4"
    assert folder.is_dir()
    assert environment["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert environment["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == str(folder)
    (tmp_path / "file").touch()
    for given in ({"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}, {"XDG_CACHE_HOME": str(tmp_path / "file")}):
        environment = dict(given)
        keep_kernels(environment)
        assert environment == given
    monkeypatch.setattr(gpu_settings, "find_spec", lambda name: None)
    keep_kernels(environment := {})
    assert environment == {}
