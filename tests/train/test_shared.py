"""Files that processes of a host share: made once, never half a file, never an old one."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from eagle_train.data import shared as module
from eagle_train.data.shared import Damaged, read_arrays, shared_arrays
from tests.support.waiting import wait_for

arrays = st.dictionaries(
    st.text("abcdefgh_", min_size=1, max_size=8),
    st.sampled_from([np.int8, np.int16, np.int32, np.int64]).flatmap(lambda kind: arrays_of.arrays(kind, st.integers(0, 40))),
    max_size=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays, st.data())
def test_arrays_come_back_and_no_damage_is_read(tmp_path, content, data):
    path = tmp_path / f"{time.monotonic_ns()}.plan"
    shared_arrays(path, lambda: content)
    found = shared_arrays(path, lambda: pytest.fail("it is there"))
    assert list(found) == list(content)
    for name, array in content.items():
        assert (found[name].dtype, found[name].tolist()) == (array.dtype, array.tolist())
        assert not found[name].flags.writeable
    whole = path.read_bytes()
    kept = data.draw(st.integers(0, len(whole) - 1))
    path.unlink()
    path.write_bytes(whole[:kept])
    with pytest.raises(Damaged):
        read_arrays(path)
    again = shared_arrays(path, lambda: content)
    assert path.read_bytes() == whole
    assert {name: array.tolist() for name, array in again.items()} == {name: array.tolist() for name, array in content.items()}


PLANS = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from eagle_train.data.shared import shared_arrays

folder, number, dies = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def make():
    (folder / f"making-{number}").write_text(str(os.getpid()))
    if dies == "while-planning":
        time.sleep(60)
    time.sleep(0.5)
    return {"rows": np.arange(200_000)}

if dies == "while-writing":
    from eagle_train.data import shared
    def half(file, arrays):
        file.write(b"EagleArrays1\\\\n")
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    shared.write_arrays = half
rows = shared_arrays(folder / "stage.plan", make)["rows"]
print(int(rows.sum()), flush=True)
"""


def start(folder, number, dies="never"):
    if not (folder / "plans.py").exists():  # a process that starts must not find it half written
        (folder / "plans.py").write_text(PLANS)
    return subprocess.Popen([sys.executable, folder / "plans.py", folder, str(number), dies], stdout=subprocess.PIPE, text=True)


def test_of_many_processes_one_plans_and_all_read(tmp_path):
    processes = [start(tmp_path, number) for number in range(4)]
    assert {process.communicate(timeout=60)[0] for process in processes} == {f"{sum(range(200_000))}\n"}
    assert len(list(tmp_path.glob("making-*"))) == 1


@pytest.mark.parametrize("dies", ["while-planning", "while-writing"])
def test_kill_nine_of_the_process_that_plans_leaves_nothing_half(tmp_path, dies):
    first = start(tmp_path, 0, dies)
    wait_for((tmp_path / "making-0").exists)
    second = start(tmp_path, 1)
    if dies == "while-planning":
        time.sleep(0.5)
        assert not (tmp_path / "making-1").exists()  # it waits
        first.kill()
    assert first.wait(timeout=30) == -signal.SIGKILL
    assert not (tmp_path / "stage.plan").exists() or (tmp_path / "making-1").exists()
    assert second.communicate(timeout=60)[0] == f"{sum(range(200_000))}\n"
    assert (tmp_path / "making-1").exists()
    assert not list(tmp_path.glob("*.tmp"))
    assert start(tmp_path, 2).communicate(timeout=60)[0] == f"{sum(range(200_000))}\n"
    assert not (tmp_path / "making-2").exists()
    first.stdout.close()


def test_without_locks_everyone_plans_for_itself(tmp_path, monkeypatch, caplog):
    import fcntl

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    assert shared_arrays(tmp_path / "a.plan", lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert "the file system has no locks (Operation not supported)" in caplog.text


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(file, arrays):
        file.write(b"EagleArrays1\n")
        raise OSError(28, os.strerror(28), file.name)

    monkeypatch.setattr(module, "write_arrays", full)
    with pytest.raises(OSError, match="No space left on device"):
        shared_arrays(tmp_path / "a.plan", lambda: {"x": np.arange(3)})
    assert {path.name for path in tmp_path.iterdir()} == {"a.plan.lock"}


def test_a_file_of_another_kind_is_not_read(tmp_path, caplog):
    path = tmp_path / "a.plan"
    path.write_text(json.dumps({"x": 1}) * 100)
    assert shared_arrays(path, lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert "is damaged and is made again" in caplog.text
