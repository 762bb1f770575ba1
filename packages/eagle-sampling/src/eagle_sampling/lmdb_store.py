"""Reading values out of LMDB files: one environment per process and real path, shared by all threads, gone before a fork.

Since lmdb 2.0 opening a path twice in a process raises, so environments are cached; py-lmdb's are not valid in a forked child,
so they are closed just before a fork and opened again by whoever reads next. Values are copied out of the map.
A read borrows a read transaction from its file's idle ones and puts it back; lists append and pop atomically, so the usual read takes
no lock, and a fork knows that no read is under way once it holds all transactions. Files must not be written while they are read.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lmdb

from .limits import MediaError


@dataclass(eq=False)
class _Open:
    environment: Any
    created: int = 0
    idle: list[Any] = field(default_factory=list)  # read transactions nobody uses now


_lock = threading.Lock()  # guards opening, new transactions, and closing
_by_real_path: dict[str, _Open] = {}
_by_name: dict[object, _Open] = {}  # path as given -> the same, because realpath costs more than a read
_hooked = False


def get(path: str | os.PathLike[str], key: str | bytes) -> bytes:
    """The value of `key`, copied. Raises MediaError when the file can't be opened or lacks the key."""
    try:
        entry = _by_name[path]
        transaction = entry.idle.pop()
    except (KeyError, IndexError):
        entry, transaction = _begin(path)
    try:
        value = transaction.get(key.encode() if isinstance(key, str) else key)
    except lmdb.Error as error:
        raise MediaError(f"{path}[{key!r}]: the LMDB can't be read: {error}; run `eagle lmdb check` on it") from error
    finally:
        entry.idle.append(transaction)
    if value is None:
        raise MediaError(f"{path}[{key!r}]: the LMDB has no such key")
    return value


def has(path: str | os.PathLike[str], key: str | bytes) -> bool:
    """True when the LMDB opens and holds `key`."""
    try:
        get(path, key)
    except MediaError:
        return False
    return True


def items(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, bytes]]:
    """All (key, value) pairs in key order, copied. A fork in this thread waits for ever inside the loop: read first, fork then."""
    entry, transaction = _begin(path)
    try:
        with transaction.cursor() as cursor:
            yield from cursor.iternext(keys=True, values=True)
    except lmdb.Error as error:
        raise MediaError(f"{path}: the LMDB can't be read: {error}; it is damaged") from error
    finally:
        entry.idle.append(transaction)


def close_all() -> None:
    """Close every environment of this process, once the reads under way have ended. Reading opens them again."""
    with _lock:
        _close_when_idle()


def _begin(path: str | os.PathLike[str]) -> tuple[_Open, Any]:
    """The environment of `path`, opened if need be, and one more read transaction in it."""
    with _lock:
        name = os.fspath(path)
        real = os.path.realpath(name)
        entry = _by_real_path.get(real)
        try:
            if entry is None:
                if not os.path.exists(real):
                    raise MediaError(f"{name}: there is no such LMDB")
                environment = lmdb.open(real, subdir=os.path.isdir(real), readonly=True, lock=False, readahead=False, create=False)
                entry = _by_real_path[real] = _Open(environment)
                _hook_fork()
            _by_name[path] = entry
            transaction = entry.environment.begin()
        except lmdb.Error as error:
            raise MediaError(f"{name}: can't be opened as an LMDB: {error}") from error
        entry.created += 1
        return entry, transaction


def _hook_fork() -> None:
    global _hooked
    if not _hooked and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
        _hooked = True


def _before_fork() -> None:
    _lock.acquire()
    _close_when_idle()


def _after_fork() -> None:
    _lock.release()


def _close_when_idle() -> None:
    """Call with the lock held, so that no new transaction begins."""
    _by_name.clear()  # first: who reads in a loop now comes to wait for the lock instead of borrowing the transaction again
    for entry in _by_real_path.values():
        held: list[Any] = []
        while len(held) < entry.created:
            try:
                held.append(entry.idle.pop())
            except IndexError:
                time.sleep(0.0002)  # a read is under way; it puts its transaction back within microseconds
        for transaction in held:
            with contextlib.suppress(lmdb.Error):
                transaction.abort()
        entry.created = 0
        with contextlib.suppress(lmdb.Error):
            entry.environment.close()
    _by_real_path.clear()
