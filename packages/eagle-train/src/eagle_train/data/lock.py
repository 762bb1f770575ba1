"""One process at a time in a folder, or at a file: locks that the kernel drops with the process that holds them, however that ends."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_NAMED_AFTER = 10.0
"""Seconds of waiting for another process after which the log says so."""


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


@contextlib.contextmanager
def waited_for(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, once no other process does. Whether it is held: not where the system or the file system has no locks."""
    with open(path, "a+b") as file:
        yield _wait(file, path)


def _wait(file, path: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    begin, named, pause = time.monotonic(), False, 0.01
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not named and time.monotonic() - begin > _NAMED_AFTER:
                named = True
                logger.info("waiting for another process that makes %s", path.with_suffix(""))
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        except OSError as error:
            logger.warning("%s: the file system has no locks (%s); several processes may make the same file", path, error.strerror)
            return False
