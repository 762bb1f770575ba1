"""A call in a process of its own: its result, its errors, and its end."""

import os
import signal
import time

import pytest

from eagle_train.executors import BackgroundCall, WorkerError
from tests.support.waiting import alive, wait_for


def described(number, text):
    return {text: number, "process": os.getpid()}


def fails(text):
    raise KeyError(text)


def unpicklable():
    return lambda: None


def waits(path):
    path.write_text(str(os.getpid()))
    time.sleep(600)


def started(path):
    """The process that `waits` in `path`."""
    wait_for(lambda: path.is_file() and path.read_text())
    return int(path.read_text())


def test_a_call_in_another_process():
    call = BackgroundCall(described, 3, "a")
    found = call.result()
    assert found["a"] == 3
    assert found["process"] != os.getpid()
    with pytest.raises(WorkerError, match="has been taken"):
        call.result()


@pytest.mark.parametrize(
    ("function", "arguments", "said"), [(fails, ("x",), r"KeyError: 'x' \(test_executors.py"), (unpicklable, (), "lambda")]
)
def test_what_fails_there_is_said_here(function, arguments, said):
    with pytest.raises(WorkerError, match=said):
        BackgroundCall(function, *arguments).result()


def test_a_process_that_dies(tmp_path):
    call = BackgroundCall(waits, tmp_path / "pid")
    os.kill(started(tmp_path / "pid"), signal.SIGKILL)
    with pytest.raises(WorkerError, match="died"):
        call.result()


def test_the_process_ends_with_what_started_it(tmp_path):
    call = BackgroundCall(waits, tmp_path / "pid")
    pid = started(tmp_path / "pid")
    del call
    wait_for(lambda: not alive(pid))
