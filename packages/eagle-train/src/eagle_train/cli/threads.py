"""Threads that compute on CPUs, for processes of `eagle`; called before torch is imported, which loads the OpenMP library."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how a thread waits: of OpenMP, of GNU's library (torch's own on Linux) and of Intel's and LLVM's."""


def sleep_while_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait for others give their core away; one of these variables that is set already stays as it is.

    By default a waiting thread spins. When another process takes a core, threads spin while the one that they wait for has no core, and a
    step of a small model takes ten times as long and more (docs/scaling.md). Results do not depend on it.
    """
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def share_cores(processes: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Divide the cores among the processes of this machine, which torchrun gives one thread each; a number that is set stays."""
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
