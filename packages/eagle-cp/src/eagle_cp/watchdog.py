"""Watchdog: when a collective hangs, say which rank waits for which, instead of a bare timeout half an hour later."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from eagle_cp.collectives import Call, Group

log = logging.getLogger("eagle_cp.watchdog")


class Watchdog:
    """A thread that looks at the unfinished collectives of `groups` a few times per `timeout` seconds. Use as a context manager, or
    `stop()`.

    `report` gets the text (default: logged as an error). A hang is reported once; nothing is killed or cancelled. Where the store's host is
    gone, which is when ranks start to wait, each rank goes on to speak for itself.
    """

    def __init__(
        self, groups: Sequence[Group], timeout: float, store: dist.Store | None = None, report: Callable[[str], None] | None = None
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

    def __exit__(self, *_) -> None:
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
                    self._tell(self._describe(group, *overdue))

    def _tell(self, text: str) -> None:
        try:
            self.report(text)
        except Exception:  # the caller's function, which nobody else would hear of in this thread; it goes on to watch
            log.exception("the watchdog's report failed; it was: %s", text)

    def _overdue(self, group: Group) -> tuple[Call, float] | None:
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
        log.error("watchdog: the store doesn't answer, its host may be gone; from here on each rank speaks for itself: %s", error)

    def _describe(self, group: Group, call: Call, seconds: float) -> str:
        rank = group.ranks[group.rank]
        head = f"rank {rank} has waited {seconds:.0f} s for {_name(call)} of group {group.name} {group.ranks}"
        if self.store is None:
            return head + " (give the watchdog a store to see the other ranks)"
        try:
            return "\n".join([head, *(f"  rank {other}: {self._heard(self.store, group, other)}" for other in group.ranks)])
        except RuntimeError as error:
            self._lose_store(error)
            return head + " (the store doesn't answer)"

    def _heard(self, store: dist.Store, group: Group, rank: int) -> str:
        key = self._key(group, rank)
        if not store.check([key]):
            return "nothing heard of"
        state = json.loads(store.get(key))
        if state["waiting"]:
            return f"waits for {_name(state['waiting'])}"
        if state["last"]:
            return f"not in a collective; its last one was {_name(state['last'])}"
        return "has called none yet"


def _name(call) -> str:
    number, operation, _, elements, dtype = call
    return f"{operation} number {number} ({elements} x {dtype})"
