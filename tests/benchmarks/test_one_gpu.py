"""The driver of all benchmarks that need one GPU: which part starts where, and what is said of those that don't."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "packages/eagle-train/benchmarks/one_gpu.py"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("one_gpu")
    for name in ("one_gpu", "parts"):
        sys.modules.pop(name, None)


WRITES = "import os, sys; open(sys.argv[2], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"


def part(module, name, code=WRITES, seconds=60.0, gib=10.0):
    return module.Part(name, [sys.executable, "-c", code], seconds, gib=gib)


def test_every_gpu_takes_what_fits(module, tmp_path, capsys):
    parts = [
        part(module, "large", gib=100),
        part(module, "long", seconds=1000),
        part(module, "small"),
        part(module, "bad", code="raise SystemExit(5)"),
        part(module, "slow", code="import time; time.sleep(60)", seconds=0.5),
        part(module, "larger", gib=200),
    ]
    queue = module.Queue(parts, tmp_path, 300)
    queue.go([module.Gpu("0", 80), module.Gpu("3", 140)])
    done = json.loads((tmp_path / "status.json").read_text())
    assert {name: status["ended"] for name, status in done.items()} == {
        "large": "complete",
        "small": "complete",
        "bad": "exit code 5",
        "slow": "stopped after 0 s",
        "long": "not started: its 1000 s did not fit in the time",
        "larger": "not started: no GPU has 200 GiB",
    }
    assert (tmp_path / "large.json").read_text() == "3"
    assert (tmp_path / "small.json").read_text() == "0"
    # What ended well is not repeated.
    capsys.readouterr()
    module.Queue([*parts[:2], part(module, "bad")], tmp_path, 3000).go([module.Gpu("0", 140)])
    assert "large" not in capsys.readouterr().out
    done = json.loads((tmp_path / "status.json").read_text())
    assert [done[name]["ended"] for name in ("long", "bad")] == ["complete", "complete"]


def test_parts_are_scripts_of_the_repository_with_limits(module):
    for small in (False, True):
        parts = module.parts(small)
        assert len({part.name for part in parts}) == len(parts)
        for part in parts:
            assert any((ROOT / word).exists() for word in part.command), part.command
            assert 0 < part.seconds <= 600


def test_a_signal_ends_the_running_part(module, tmp_path):
    pid = tmp_path / "pid"
    sleeps = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import sys, signal; sys.path.insert(0, sys.argv[1]); import one_gpu\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"queue = one_gpu.Queue([one_gpu.Part('slow', [sys.executable, '-c', {sleeps!r}], 600)], Path(sys.argv[2]), 1000)\n"
        "print('begins', flush=True)\n"
        "queue.go([one_gpu.Gpu('', 1)])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(SCRIPT.parent), str(tmp_path)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "begins\n"
        while not pid.exists() or not pid.read_text():
            assert driver.poll() is None
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_it_lists_its_parts_and_refuses_unknown_ones(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    listed = subprocess.run([*command, "--list", "--only", "tests"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert [line.partition(" ")[0] for line in listed.splitlines()] == [
        f"tests-{name}" for name in ("kernels", "cp", "model", "train", "tiling")
    ]
    refused = subprocess.run([*command, "--only", "nothing"], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "--only nothing: no such part; parts are one-512k, science-fill" in refused.stderr
    assert not (tmp_path / "out").exists()
