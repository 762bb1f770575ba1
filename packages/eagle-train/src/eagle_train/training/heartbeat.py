"""Reports a step that takes long, once a minute, with what every rank does meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from .metrics import duration

EVERY = 60.0
"""Seconds of one step after which a line is printed, and again after as many."""


class Heartbeat:
    """`with Heartbeat(write)`: a thread that reads what `begin` and `at` set, and calls `write` when a step takes longer than `every`.

    store, rank, size: of a job with several ranks (`torch.distributed.Store`). In a slow step each rank publishes what it does, and the
    main rank, the only one that writes, names what the others wait in.
    """

    def __init__(
        self, write: Callable[[str], None], every: float | None = None, *, store: Any = None, rank: int = 0, size: int = 1
    ) -> None:
        self._write, self._every = write, EVERY if every is None else every
        self._store, self._rank, self._size = store, rank, size
        self._now: tuple[str, float] | None = None
        self._place = ("", 0.0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eagle-heartbeat", daemon=True)

    def begin(self, step: str) -> None:
        """A step begins; the clock starts again."""
        now = time.monotonic()
        self._place, self._now = ("", now), (step, now)

    def at(self, place: str) -> None:
        """What the step does now."""
        self._place = place, time.monotonic()

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
            if seconds >= self._every / 2:
                self._publish(now[0])
            if seconds >= due:
                due += self._every
                if self._rank == 0:
                    place = self._place[0]
                    self._write(f"{now[0]}: {duration(seconds)}" + (f", now in {place}" if place else "") + self._others(now[0]))

    def _publish(self, step: str) -> None:
        if self._store is None:
            return
        place, since = self._place
        try:
            self._store.set(f"doing/{self._rank}", json.dumps([step, place, time.monotonic() - since]))
        except RuntimeError:  # the host of the store is gone, which ends the run
            self._store = None

    def _others(self, step: str) -> str:
        """What the other ranks do, those in the same place together, with the shortest and longest wait; empty for one rank."""
        if self._store is None:
            return ""
        waits: dict[str, dict[int, float]] = {}
        silent = []
        try:
            for rank in range(self._size):
                key = f"doing/{rank}"
                if rank == self._rank:
                    continue
                if not self._store.check([key]):
                    silent.append(rank)
                    continue
                named, place, seconds = json.loads(self._store.get(key))
                where = "" if named == step else f"{named}, "
                waits.setdefault(f"{where}{place or 'its beginning'}", {})[rank] = seconds
        except RuntimeError:
            self._store = None
            return ""
        parts = []
        for place, ranks in waits.items():
            least, most = duration(min(ranks.values())), duration(max(ranks.values()))
            parts.append(f"; rank {_listed(ranks)}: {place} for {least if least == most else f'{least} to {most}'}")
        if silent:
            parts.append(f"; rank {_listed(silent)}: has not reported")
        return "".join(parts)


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
