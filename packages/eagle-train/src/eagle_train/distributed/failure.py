"""When one rank fails, it alone is to report it: the others lose their connection to it, and leave the message to the one that knows.

A rank that fails writes that to the store of the job before it leaves. A rank whose connection broke looks there for a few seconds. Where
nobody has written anything, the other process was killed: torchrun says so, with the rank and the signal, where all ranks are its own;
elsewhere the first rank that noticed does.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

KEY = "failed"
NOTICED = "lost"
"""Counts the ranks that lost another one and found no message of it."""
PATIENCE = 5.0
"""Seconds in which a rank that failed has written its message."""

#: What gloo, NCCL and the store say when the other side of a connection is gone.
_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|remote process exited|NCCL.*(closed|aborted)"
    r"|Socket closed|failed to recv|recvBytes|Read error|Write error",
    re.IGNORECASE,
)


class LostRank:
    """What an error that followed from another rank's end carries (`error.lost_rank`). reporter: the rank that reports the cause."""

    def __init__(self, rank: int, reporter: str | None, *, without_store: bool = False) -> None:
        """without_store: the store, which the process of rank 0 has where torchrun does not, is gone: nobody can say why."""
        self.reporter = reporter
        killed = "killed (a signal, or the host ran out of memory; the system log has it) or its host is gone"
        if without_store:
            cause = f"rank 0, whose process ended. If rank 0 printed an error, that is the cause; else it was {killed}"
        else:
            cause = f"another rank, which ended without a message: it was {killed}"
        self.message = f"rank {rank} lost its connection to {cause}. The same command continues the run"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"DistBackendError", "DistNetworkError"} or ("RuntimeError" in kinds and _LOST.search(str(error))))


def leave(store: Any, rank: int, error: BaseException, patience: float = PATIENCE) -> None:
    """Publish that this rank fails with `error`, or, when that only says that another rank is gone, find out which one reports it.

    Sets `error.lost_rank` in the second case. store: of the job (`torch.distributed.Store`), or None.
    """
    if not is_lost(error):
        if store is not None and not getattr(error, "on_every_rank", False):
            try:
                store.set(KEY, f"rank {rank}")
            except RuntimeError:  # the host of the store is gone: the others report what they see
                return
        return
    reporter, without_store = None, False
    if launcher_reports():
        # Nothing to find out, and each rank that stays keeps the connections open that others wait on: 8 ranks of gloo ended 5 s one after
        # the other, 25 s in all.
        reporter = "torchrun"
    elif store is not None:
        try:
            reporter = _reporter(store, patience) or _other_reporter(store)
        except RuntimeError:
            without_store = True
    error.lost_rank = LostRank(rank, reporter, without_store=without_store)  # type: ignore[attr-defined]


def launcher_reports(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started all ranks of the job here: it names a rank that a signal ended."""
    return "TORCHELASTIC_RUN_ID" in environment and environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")


def _other_reporter(store: Any) -> str | None:
    """Who reports a rank that was killed, if not this one."""
    return "another rank" if store.add(NOTICED, 1) > 1 else None


def _reporter(store: Any, patience: float) -> str | None:
    """The rank that says that it failed, as soon as one does. Both raise RuntimeError when the store is gone."""
    deadline = time.monotonic() + patience
    while True:
        if store.check([KEY]):
            return store.get(KEY).decode()
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
