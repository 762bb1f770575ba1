"""One process at a time in a folder: a lock that the kernel drops with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path, busy: Callable[[str], Exception]) -> Iterator[None]:
    """Hold the folder, which is made if need be.

    busy: makes the error that is raised when another process holds it, from the name of that process. Where the system or the file system
    has no locks, nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        _lock(file, folder, busy)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(file, folder: Path, busy: Callable[[str], Exception]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        # On the open file: processes that are started (not forked) inherit nothing of it, and readers that outlive this one hold nothing.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise busy(file.read() or "another process") from None
    except OSError as error:
        logger.warning("%s: the file system has no locks (%s); make sure that no other process works there", folder, error.strerror)
