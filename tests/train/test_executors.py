"""A call in a process of its own: its result, its errors, and its end."""

import os
import signal
import time

import pytest

from eagle_train.executors import Aside, WorkerError


def described(number, text):
    return {text: number, "process": os.getpid()}


def fails(text):
    raise KeyError(text)


def unpicklable():
    return lambda: None


def waits(path):
    path.write_text(str(os.getpid()))
    time.sleep(600)


def gone(pid):
    """Whether a process has ended, within ten seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def started(path):
    while not (path.is_file() and path.read_text()):
        time.sleep(0.05)
    return int(path.read_text())


def test_a_call_in_another_process():
    aside = Aside(described, 3, "a")
    found = aside.result()
    assert found["a"] == 3
    assert found["process"] != os.getpid()
    with pytest.raises(WorkerError, match="has been taken"):
        aside.result()


@pytest.mark.parametrize(
    ("function", "arguments", "said"), [(fails, ("x",), r"KeyError: 'x' \(test_executors.py"), (unpicklable, (), "lambda")]
)
def test_what_fails_there_is_said_here(function, arguments, said):
    with pytest.raises(WorkerError, match=said):
        Aside(function, *arguments).result()


def test_a_process_that_dies(tmp_path):
    aside = Aside(waits, tmp_path / "pid")
    os.kill(started(tmp_path / "pid"), signal.SIGKILL)
    with pytest.raises(WorkerError, match="died"):
        aside.result()


def test_the_process_ends_with_what_started_it(tmp_path):
    aside = Aside(waits, tmp_path / "pid")
    pid = started(tmp_path / "pid")
    del aside
    assert gone(pid)
