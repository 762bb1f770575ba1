"""Reports a step that takes long, once a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .metrics import duration

EVERY = 60.0
"""Seconds of one step after which a line is printed, and again after as many."""


class Heartbeat:
    """`with Heartbeat(write)`: a thread that reads what `begin` and `at` set, and calls `write` when a step takes longer than `every`."""

    def __init__(self, write: Callable[[str], None], every: float | None = None) -> None:
        self._write, self._every = write, EVERY if every is None else every
        self._now: tuple[str, float] | None = None
        self._place = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eagle-heartbeat", daemon=True)

    def begin(self, step: str) -> None:
        """A step begins; the clock starts again."""
        self._place, self._now = "", (step, time.monotonic())

    def at(self, place: str) -> None:
        """What the step does now."""
        self._place = place

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        reported, due = None, 0.0
        while not self._over.wait(self._every / 60):
            now = self._now
            if now is None:
                continue
            if now is not reported:
                reported, due = now, self._every
            seconds = time.monotonic() - now[1]
            if seconds >= due:
                due += self._every
                self._write(f"{now[0]}: {duration(seconds)}" + (f", now in {self._place}" if self._place else ""))
