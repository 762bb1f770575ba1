"""One trainer per run folder: a lock that the kernel drops with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from eagle_train.config import ConfigError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be. Raises ConfigError when another process holds it, naming that process.

    Where the system or the file system has no locks, nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        _lock(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(file, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        # On the open file: processes that are started (not forked) inherit nothing of it, and readers that outlive us hold nothing.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        raise ConfigError(f"{folder} is being trained by {holder}: wait for it or stop it, or give this run another run.name") from None
    except OSError as error:
        logger.warning("%s: the file system has no locks (%s); make sure that no other process trains there", folder, error.strerror)
