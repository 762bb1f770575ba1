"""Where the time goes between a command and the end of its first step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping

BEGAN = "EAGLE_BEGAN"
"""Set by the process that a user starts, and read by the ranks that it launches: its `time.monotonic()`."""


def note_beginning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Called first in a process; ranks of a launcher keep what it has noted."""
    if "RANK" not in environment or BEGAN not in environment:
        environment[BEGAN] = str(time.monotonic())


class StartUp:
    """Seconds of each phase, in their order: `over(phase)` ends the one that began when the one before ended."""

    def __init__(self, began: float | None = None) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.monotonic() if began is None else began

    @classmethod
    def of_command(cls, environment: Mapping[str, str] = os.environ) -> StartUp:
        """One that begins with the command (`note_beginning`)."""
        return cls(float(environment[BEGAN]) if BEGAN in environment else None)

    def over(self, phase: str) -> None:
        """A phase ends now."""
        now = time.monotonic()
        self.phases[phase] = round(now - self._last, 2)
        self._last = now

    def line(self) -> str:
        """`first step after 31 s: launch 4.1, imports 5.0, ...`; phases of less than 0.05 s are left out."""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items() if seconds >= 0.05)
        return f"first step after {sum(self.phases.values()):.1f} s: {parts}"
