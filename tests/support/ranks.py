"""Ranks on this machine, over gloo, for tests.

`Ranks` and `run_on_ranks` fork them from the test process, which has imported torch (importing it takes seconds); functions get what they
need through the fork or a pipe. `start_processes` starts new ones, as torchrun does, for tests of commands and scripts.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A fork keeps one thread, and OpenMP waits for the others forever.
torch.set_num_threads(1)
# The first gradient makes torch import sympy: here once, instead of in every forked rank.
torch.autograd.grad((_x := torch.ones(1, requires_grad=True)) * 2, _x, torch.ones(1))

GROUP_TIMEOUT = timedelta(seconds=60)  # of a collective
GRACE = 1.0  # seconds in which the other ranks may answer when one has failed


class Ranks:
    """`size` forked ranks of a gloo group, which start at the first call. Use it in a `with` statement, or call `close()`.

    setup: called in every rank after the group is made; its result is the first argument of every function.
    """

    def __init__(self, size: int, setup: Callable[[], Any] = lambda: None):
        self.size, self.setup = size, setup
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> list[Any]:
        """`function(state, *arguments)` on every rank; the results in the order of ranks. `function` is one of a module that is imported
        already, or importable.

        Raises AssertionError with the traceback of the first rank that fails, or the names of those that take longer than `timeout`
        seconds. The group starts anew after a failure that some ranks did not answer.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        failure = None
        deadline = time.monotonic() + timeout
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, answer = pipe.recv()
                    answers[rank] = answer
                except EOFError:
                    good, answer = False, "the process ended without an answer"
                if not good and failure is None:
                    failure = f"rank {rank} of {self.size}: {answer}"
                    deadline = min(deadline, time.monotonic() + GRACE)
        missing = [rank for rank in range(self.size) if rank not in answers]
        if missing:
            self.close(kill=True)
            failure = failure or f"ranks {missing} of {self.size} did not answer within {timeout} s"
        assert failure is None, f"{failure}\n{function.__name__} {arguments}"
        return [answers[rank] for rank in range(self.size)]

    def close(self, kill: bool = False) -> None:
        """Ends the ranks; the next call starts new ones."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            if not kill:
                process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        gc.collect()
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name, "store"))
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, store, theirs, [*self._pipes, ours], self.setup)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)


def run_on_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 100) -> list[Any]:
    """`function(*arguments)` once on each of `size` forked ranks, which inherit function and arguments; the results in the order of ranks.

    Results go through a pipe, so return arrays instead of tensors. Fails as `Ranks.call` does.
    """
    with Ranks(size, lambda: functools.partial(function, *arguments)) as ranks:
        return ranks.call(_run, timeout=timeout)


def _run(work: Callable[[], Any]) -> Any:
    return work()


def _serve(rank: int, size: int, store: str, pipe: Any, inherited: Sequence[Any], setup: Callable[[], Any]) -> None:
    for other in inherited:  # the test's ends: a rank that holds them would not notice that the test process is gone
        other.close()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    state, ready = None, False
    with contextlib.suppress(EOFError):
        while (message := pipe.recv()) is not None:
            function, arguments = message
            try:
                if not ready:
                    group = dist.FileStore(store, size)
                    dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
                    state, ready = setup(), True
                answer = True, function(state, *arguments)
            except BaseException:
                answer = False, traceback.format_exc()
            try:
                pipe.send(answer)
            except Exception:  # a result that can't be pickled
                pipe.send((False, traceback.format_exc()))
    os._exit(0)  # torch 2.11 aborted once while the interpreter exited


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start_processes(command: Sequence[str], size: int, *, stderr: int = subprocess.STDOUT, **environment: str) -> list[subprocess.Popen]:
    """`command` as `size` ranks with torchrun's environment variables (one rank: without them), each the leader of a process group."""
    common = os.environ | {"OMP_NUM_THREADS": "1"}
    if size > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            command,
            env=common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}) | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]


def outputs_of(processes: Sequence[subprocess.Popen], timeout: float = 240) -> list[str]:
    """What each process wrote until it ended. Kills all of them and raises AssertionError with that when one takes longer than `timeout`
    seconds."""
    deadline = time.monotonic() + timeout

    def output_of(process: subprocess.Popen) -> str:
        return process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]

    try:
        with ThreadPoolExecutor(len(processes)) as readers:  # at once: a process whose pipe is full waits, and others wait for it
            return list(readers.map(output_of, processes))
    except subprocess.TimeoutExpired:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        written = [process.communicate()[0] for process in processes]
        raise AssertionError(f"not ended within {timeout} s; output by rank:\n" + "\n".join(written)) from None
