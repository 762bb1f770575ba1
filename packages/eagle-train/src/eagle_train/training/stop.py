"""Stopping on request: SIGINT (Ctrl-C) and SIGTERM (Slurm, `timeout`, torchrun).

While steps are trained, the first signal is a request: the running step is finished, a checkpoint is written, and `Interrupted` is raised
on every rank. Anywhere else it raises `Interrupted` at once. A second SIGINT ends the process at once, also where the main thread waits
inside a collective and can't run a handler.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagle_train.distributed.failure import launcher_reports

from . import checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEATED = 1.0
"""Seconds in which a second signal counts as the first one: a terminal and a launcher may both deliver one Ctrl-C."""


NOTHING = "nothing was trained yet: the same command starts again; rows of complete parts of the facts are not measured again"


class Interrupted(BaseException):
    """A signal ended the command; the text names what was saved and what the same command continues from."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """`with StopSignals(...)` handles SIGINT and SIGTERM; without the `with`, nothing is handled and nothing is ever requested.

    describe: what was saved, for the last message; called when it is needed, from any thread. quiet: print nothing (ranks other
    than the main rank).
    """

    def __init__(self, describe: Callable[[], str] = lambda: NOTHING, *, quiet: bool = False) -> None:
        self.describe, self.quiet = describe, quiet
        #: Whether this process has trained a step.
        self.training = False
        #: The signal that asked for a stop while steps were trained, or 0.
        self.requested = 0
        self._deferred = self._ended = False
        self._first: float | None = None
        self._before: list[Any] = []

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._before = [signal.signal(number, self._handle) for number in SIGNALS]
        threading.Thread(target=self._watch, name="eagle-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, handler in zip(SIGNALS, self._before):
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            self._write.close()  # which ends the thread

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this, a signal sets `requested` instead of raising."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            self._ended = self._ended or bool(self.requested)
        if self.requested:
            raise Interrupted(self.requested)

    def _handle(self, signum: int, _: object) -> None:
        if self._deferred:
            self.requested = self.requested or signum
        elif not self._ended:  # once: what is cleaned up meanwhile is not interrupted
            self._ended = True
            raise Interrupted(signum, f"interrupted; {self.describe()}")

    def _watch(self) -> None:
        """Wakes when a signal arrives, whatever the main thread does."""
        with self._read as pipe:
            while arrived := pipe.recv(64):
                for signum in arrived:
                    if signum in SIGNALS:
                        self._arrived(signum)

    def _arrived(self, signum: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if self._deferred and signum == signal.SIGTERM and launcher_reports():
                # torchrun also ends the ranks that lost another one, which then leave before this is said.
                announce = threading.Timer(REPEATED, self._announce)
                announce.daemon = True
                announce.start()
            else:
                self._announce()
        elif signum == signal.SIGINT and now - self._first > REPEATED:
            self._write_line(f"ended at once; {self.describe()}")
            os._exit(128 + signum)

    def _announce(self) -> None:
        if self._deferred:
            self._write_line("stopping: the running step is finished and a checkpoint is written; Ctrl-C again ends the run at once")

    def _write_line(self, text: str) -> None:
        if not self.quiet:
            sys.stdout.flush()
            os.write(2, f"\n{text}\n".encode())


def what_is_saved(folder: Path, last_stage: str, *, began: bool) -> str:
    """What the same command continues from, read from the checkpoints of a run folder. began: whether this process trained a step."""
    path = checkpoint.latest(folder / "checkpoints")
    if path is None and not began:
        return NOTHING
    if path is None:
        return "no checkpoint was written: the same command starts from the first step"
    progress = checkpoint.read_progress(path)
    if progress.done and progress.stage_name == last_stage:
        return f"all stages are trained (checkpoint {path.name}): the same command only repeats what follows training"
    if progress.done:
        return f"the same command continues from the end of stage {progress.stage_name} (checkpoint {path.name})"
    return f"the same command continues after step {progress.step} of stage {progress.stage_name} (checkpoint {path.name})"
