"""torchrun in the process of the command, with one readable end: what a rank reported is not repeated, and its exit code is kept."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from . import launch
from .threads import share_cores

PASSED_ON = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGTERM}
"""Signals of the command, and what its ranks get for them. A terminal that closes stops a run as SIGTERM does."""


class RanksEnded(SystemExit):
    """The exit code of a rank, which has printed why."""

    reported = True


def launch_ranks(nproc: int | None, device: str | None, name: str, *, nodes: int = 1, rendezvous: str | None = None) -> None:
    """When there is more than one process to start, this one becomes their launcher and exits as they do.

    They run the command line of this process. nproc, device: as `launch.processes` takes them. name: of the job.
    """
    count = launch.processes(nproc, device)
    if count * nodes > 1:
        if not launch.gpus(device):
            share_cores(count)
        run_ranks(launch.torchrun(launch.without_launch_options(sys.argv[1:]), count, nodes, rendezvous, name))


def run_ranks(arguments: Sequence[str]) -> NoReturn:
    """Run torchrun with `arguments` and exit as the first rank that failed did."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun logs every process that it ends, and what it knows of their errors, which the ranks have printed.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with signals_passed_on():
            # At a signal torchrun itself kills its ranks 30 s later, when they may be writing a checkpoint.
            run.run(run.parse_args(["--signals-to-handle", "SIGQUIT", *arguments]))
    except ChildFailedError as error:
        text, code = ending(*cause(error))
        if text:
            print(text, file=sys.stderr)
        raise RanksEnded(code) from None
    sys.exit(0)


@contextmanager
def signals_passed_on() -> Iterator[None]:
    """Give the ranks the signals that this process gets, and wait for their end; without ranks this process exits.

    The ranks finish their step and write a checkpoint, and a second SIGINT ends them at once. They are in sessions of their own, where no
    signal of a terminal reaches them.
    """

    def handle(number: int, _: object) -> None:
        pids = children()
        if not pids:
            sys.exit(128 + number)
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, PASSED_ON[signal.Signals(number).name])

    before = {}
    for name in PASSED_ON:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        nohup = name == "SIGHUP" and number is not None and signal.getsignal(number) is signal.SIG_IGN
        if number is not None and not nohup:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def children() -> list[int]:
    """The processes that this one has started and that have not been waited for."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    if not lists:  # no /proc, as on macOS
        lists = [subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False).stdout]
    return [int(pid) for text in lists for pid in text.split()]


def cause(error: Any) -> tuple[int, Any]:
    """Rank and failure that the others follow from: one that a signal ended, though not torchrun's own SIGTERM; else the first one.

    Ranks that lost a killed one may have ended by the time torchrun looks.
    """
    for rank, failure in error.failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return rank, failure
    return error.get_first_failure()


def ending(rank: int, failure: Any) -> tuple[str, int]:
    """What is left to say about the rank that failed first, and the exit code. A rank that exits has printed its error."""
    if failure.exitcode >= 0:
        return "", failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    why = "; the host may be out of memory (the system log has it)" if name == "SIGKILL" else ""
    return f"error: rank {rank} was ended by {name}{why}. The same command continues the run", 128 - failure.exitcode
