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

    def __init__(self, rank: int, reporter: str | None) -> None:
        self.reporter = reporter
        self.message = (
            f"rank {rank} lost its connection to another rank, which ended without a message: it was killed (a signal, or the host ran out "
            "of memory; the system log has it) or its host is gone. The same command continues the run"
        )


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
    if launcher_reports():
        # Nothing to find out, and each rank that stays keeps the connections open that others wait on: 8 ranks of gloo ended 5 s one after
        # the other, 25 s in all.
        reporter = "torchrun"
    else:
        reporter = _reporter(store, patience) or _other_reporter(store)
    error.lost_rank = LostRank(rank, reporter)  # type: ignore[attr-defined]


def launcher_reports(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started all ranks of the job here: it names a rank that a signal ended."""
    return "TORCHELASTIC_RUN_ID" in environment and environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")


def _other_reporter(store: Any) -> str | None:
    """Who reports a rank that was killed, if not this one."""
    try:
        return "another rank" if store is not None and store.add(NOTICED, 1) > 1 else None
    except RuntimeError:  # the host of the store is gone, and nobody knows who else is left
        return None


def _reporter(store: Any, patience: float) -> str | None:
    deadline = time.monotonic() + patience
    while store is not None:
        try:
            if store.check([KEY]):
                return store.get(KEY).decode()
        except RuntimeError:
            return None
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return None
