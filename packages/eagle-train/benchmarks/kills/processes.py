"""The processes of one command, found by a variable in their environment: ranks, and the processes that read media for them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

MARK = "EAGLE_BENCHMARK_KILLS"
"""Its value is another one for every command."""


class Processes:
    """mark: the value of `MARK` in the environment of the command, which all processes that it starts inherit."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()

    def alive(self) -> dict[int, int | None]:
        """The rank of every process, by its number; None for the launcher. Processes that ended and wait for their parent are left out."""
        found: dict[int, int | None] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    variables = (folder / "environ").read_bytes().split(b"\0")
                    if self._mark not in variables or _state(int(folder.name))[0] == "Z":
                        continue
                except (OSError, IndexError):  # it has ended, or belongs to another user
                    continue
                ranks = [int(value[5:]) for value in variables if value.startswith(b"RANK=")]
                found[int(folder.name)] = ranks[0] if ranks else None
        return found

    def rank(self, rank: int) -> int | None:
        """The process of a rank: the one whose parent is none of it. None while it does not exist."""
        alive = self.alive()
        for number, of in alive.items():
            if of == rank and alive.get(_parent(number), None) != rank:
                return number
        return None

    def of(self, rank: int) -> list[int]:
        """All processes of a rank."""
        return [number for number, of in self.alive().items() if of == rank]

    def end(self, patience: float = 3.0) -> int:
        """Wait for all processes to end, at most so many seconds; those that are left are killed. Returns how many these were."""
        deadline = time.monotonic() + patience
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for number in left:
            send(number, signal.SIGKILL)
        return len(left)


def send(number: int, signum: signal.Signals) -> bool:
    """Send a signal; False where the process has ended."""
    try:
        os.kill(number, signum)
    except ProcessLookupError:
        return False
    return True


def _state(number: int) -> list[str]:
    """State, parent, ... of a process, as in /proc/N/stat after the name, which may hold spaces and brackets."""
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()


def _parent(number: int) -> int:
    try:
        return int(_state(number)[1])
    except (OSError, IndexError):
        return 0


def has_open(number: int, folder: Path) -> bool:
    """Whether a process has a file under `folder` open now."""
    try:
        return any(_under(Path(f"/proc/{number}/fd/{name}"), folder) for name in os.listdir(f"/proc/{number}/fd"))
    except OSError:
        return False


def _under(link: Path, folder: Path) -> bool:
    try:
        return os.readlink(link).startswith(f"{folder}{os.sep}")
    except OSError:  # closed meanwhile
        return False
