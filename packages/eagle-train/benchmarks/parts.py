"""Benchmarks as parts of a larger one: a command with a time limit, whose output and result are in a folder (`host.py`, `one_gpu.py`)."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
"""Of the repository, where commands run."""
GRACE = 20.0
"""Seconds between asking a part to end and ending it."""
NOT_STARTED = {"exit_code": None, "seconds": 0.0}


@dataclass(frozen=True)
class Part:
    """One command. seconds: its limit; metric: of its bars; gib: GPU memory that it needs; result: the option that takes the result's path,
    and that path's ending."""

    name: str
    command: list[str]
    seconds: float
    metric: str = ""
    gib: float = 0.0
    result: tuple[str, str] = ("--out", ".json")


class Running:
    """A part that has been started. Its output is in `out` as NAME.txt, its result as NAME and `part.result`'s ending."""

    def __init__(self, part: Part, out: Path, seconds: float, environment: Mapping[str, str] | None = None) -> None:
        """seconds: after which it is ended. environment: added to that of this process."""
        self.part, self.seconds, self.begin = part, seconds, time.monotonic()
        option, ending = part.result
        command = [*part.command, option, str(out / f"{part.name}{ending}")]
        given = os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {})
        with open(out / f"{part.name}.txt", "wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=given, start_new_session=True)

    def status(self, patience: float = 0.0) -> dict[str, Any] | None:
        """How it ended; None if it goes on, after `patience` seconds."""
        left = self.begin + self.seconds - time.monotonic()
        try:
            code = self.process.wait(timeout=max(0.0, min(patience, left)))
            ended = "complete" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            if left > patience:
                return None
            ended, code = f"stopped after {self.seconds:.0f} s", None
            self.end()
        seconds = round(time.monotonic() - self.begin, 1)
        return {"ended": ended, "exit_code": code, "seconds": seconds, "command": shlex.join(self.part.command)}

    def end(self) -> None:
        """End the command and what it started."""
        end(self.process)


def run(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part for at most so many seconds: how it ended."""
    running = Running(part, out, seconds)
    try:
        while (status := running.status(patience=60.0)) is None:
            pass
    finally:
        running.end()
    return status


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started: asked first, so that it can end ranks that are in sessions of their own."""
    for signum, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5.0)):
        if process.poll() is None:
            try:
                os.killpg(process.pid, signum)
                process.wait(timeout=patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
