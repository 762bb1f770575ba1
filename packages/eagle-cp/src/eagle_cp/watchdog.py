"""Watchdog: when a collective hangs, report which rank waits for which collective, long before torch's timeout of 10 to 30 minutes."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch.distributed as dist

from eagle_cp.collectives import CollectiveCall, Group

log = logging.getLogger("eagle_cp.watchdog")


class Watchdog:
    """A thread that checks the unfinished collectives of `groups` four times per `timeout` seconds. Use it in a `with` statement, or call
    `stop()`.

    store: where ranks publish their state. When the store fails (its host may be the one that is gone), each rank reports only its own
        state from then on.
    report: called with the text (default: it is logged as an error). A hang is reported once; nothing is killed or cancelled.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        timeout: float,
        store: dist.Store | None = None,  # pyright: ignore[reportPrivateImportUsage]
        report: Callable[[str], None] | None = None,
    ):
        self.groups = [g for g in groups if g.size > 1]
        self.timeout, self.store = timeout, store
        self.report = report or log.error
        self._reported: set[tuple[str, int]] = set()
        self._stop = threading.Event()
        for group in self.groups:
            group.pending = []
        self._thread = threading.Thread(target=self._run, name="eagle-cp-watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        for group in self.groups:
            group.pending = None

    def _run(self) -> None:
        while not self._stop.wait(self.timeout / 4):
            for group in self.groups:
                self._publish(group)
                overdue = self._overdue(group)
                if overdue is not None and (group.name, overdue[0].number) not in self._reported:
                    self._reported.add((group.name, overdue[0].number))
                    self._send(self._describe(group, *overdue))

    def _send(self, text: str) -> None:
        try:
            self.report(text)
        except Exception:  # of the caller's function; an error must not end this thread
            log.exception("the watchdog's report failed; it was: %s", text)

    def _overdue(self, group: Group) -> tuple[CollectiveCall, float] | None:
        now = time.monotonic()
        waiting = [p for p in list(group.pending or ()) if not p.work.is_completed()]
        late = [(p.call, now - p.since) for p in waiting if now - p.since > self.timeout]
        return late[0] if late else None

    def _key(self, group: Group, rank: int) -> str:
        return f"eagle_cp/{group.name}/{'-'.join(map(str, group.ranks))}/{rank}"

    def _publish(self, group: Group) -> None:
        if self.store is None:
            return
        waiting = [p.call for p in list(group.pending or ()) if not p.work.is_completed()]
        state = {"last": group.last, "waiting": waiting[0] if waiting else None}
        try:
            self.store.set(self._key(group, group.ranks[group.rank]), json.dumps(state))
        except RuntimeError as error:
            self._lose_store(error)

    def _lose_store(self, error: RuntimeError) -> None:
        self.store = None
        log.error("watchdog: the store doesn't answer, its host may be gone; each rank now reports only its own state: %s", error)

    def _describe(self, group: Group, call: CollectiveCall, seconds: float) -> str:
        rank = group.ranks[group.rank]
        head = f"rank {rank} has waited {seconds:.0f} s for {_name(call)} of group {group.name} {group.ranks}"
        if self.store is None:
            return head + " (give the watchdog a store to see the other ranks)"
        try:
            return "\n".join([head, *(f"  rank {other}: {self._state(self.store, group, other)}" for other in group.ranks)])
        except RuntimeError as error:
            self._lose_store(error)
            return head + " (the store doesn't answer)"

    def _state(self, store: dist.Store, group: Group, rank: int) -> str:  # pyright: ignore[reportPrivateImportUsage]
        key = self._key(group, rank)
        if not store.check([key]):
            return "no state published"
        state = json.loads(store.get(key))
        if state["waiting"]:
            return f"waits for {_name(state['waiting'])}"
        if state["last"]:
            return f"not in a collective; its last one was {_name(state['last'])}"
        return "has called no collective yet"


def _name(call: CollectiveCall | list[Any]) -> str:
    number, operation, _, elements, dtype = call
    return f"{operation} number {number} ({elements} x {dtype})"
