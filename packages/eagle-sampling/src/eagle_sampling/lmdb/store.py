"""Read values from LMDB files: one environment per process and real path, shared by all threads, closed before a fork.

Since lmdb 2.0 opening a path twice in a process raises, so environments are cached. They are not valid in a forked child, so they are
closed before a fork and opened again by the next read. Values are copied out of the map.
A read takes a read transaction from the idle ones of its file and returns it; lists append and pop atomically, so the usual read takes no
lock, and a fork waits until it holds all transactions. Files must not be written while they are read.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lmdb

from ..limits import MediaError


@dataclass(eq=False)
class _Open:
    environment: Any
    idle: list[Any] = field(default_factory=list)  # read transactions that are not in use
    # All of them, weakly: one that Ctrl-C removed while it was in use does not come back, and must not be waited for.
    transactions: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


_lock = threading.Lock()  # guards opening, new transactions, and closing
_by_real_path: dict[str, _Open] = {}
_by_name: dict[object, _Open] = {}  # absolute path as given -> the same object, because realpath costs more than a read
_hooked = False


def get(path: str | os.PathLike[str], key: str | bytes) -> bytes:
    """The value of `key`, copied. Raises MediaError when the file cannot be opened, is cut off, or has no such key."""
    try:
        entry = _by_name[path]
        transaction = entry.idle.pop()
    except (KeyError, IndexError):
        entry, transaction = _take(path)
    try:
        value = transaction.get(key.encode() if isinstance(key, str) else key)
    except (lmdb.BadValsizeError, UnicodeEncodeError, TypeError) as error:
        raise MediaError(f"{path}[{key!r}]: not an LMDB key: a key is text of 1 to 511 bytes in UTF-8") from error
    except lmdb.Error as error:
        raise MediaError(f"{path}[{key!r}]: the LMDB can't be read: {error}; run `eagle lmdb check` on it") from error
    finally:
        entry.idle.append(transaction)
    if value is None:
        raise MediaError(f"{path}[{key!r}]: the LMDB has no such key")
    return value


def has(path: str | os.PathLike[str], key: str | bytes) -> bool:
    """True when the LMDB can be opened and holds `key`."""
    try:
        get(path, key)
    except MediaError:
        return False
    return True


def items(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, bytes]]:
    """All (key, value) pairs in key order, copied. Do not fork inside the loop: the fork would wait for the loop's own transaction."""
    entry, transaction = _take(path)
    try:
        with transaction.cursor() as cursor:
            yield from cursor.iternext(keys=True, values=True)
    except lmdb.Error as error:
        raise MediaError(f"{path}: the LMDB can't be read: {error}; it is damaged") from error
    finally:
        entry.idle.append(transaction)


def close_all() -> None:
    """Close every environment of this process after the current reads. The next read opens them again."""
    with _lock:
        _close_when_idle()


def require_whole(environment: Any, path: str) -> None:
    """Raise MediaError when the file at `path` is shorter than its header states: reading a missing page kills the process."""
    file = os.path.join(path, "data.mdb") if os.path.isdir(path) else path
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = os.path.getsize(file)
    if found < expected:
        # Pages that a writer allocated and freed in its last transaction are not written either; a compact copy has none.
        advice = "copy or build it again; if nothing is missing, `mdb_copy -c` makes a whole one"
        raise MediaError(f"{file}: is cut off: {found} of {expected} bytes are there; {advice}")


def _take(path: str | os.PathLike[str]) -> tuple[_Open, Any]:
    """The environment of `path` and a read transaction in it: an idle one, or a new one."""
    if os.path.isabs(path):
        return _begin(path)
    try:
        absolute = os.path.join(os.getcwd(), path)  # a relative name is another file after a chdir, so it is not a key of _by_name
    except OSError as error:
        raise MediaError(f"{path}: is relative to a working directory that no longer exists") from error
    try:
        entry = _by_name[absolute]
        return entry, entry.idle.pop()
    except (KeyError, IndexError):
        return _begin(absolute)


def _begin(path: str | os.PathLike[str]) -> tuple[_Open, Any]:
    """The environment of the absolute `path`, opened if necessary, and a new read transaction in it."""
    with _lock:
        name = os.fspath(path)
        try:
            real = os.path.realpath(name)
            there = os.path.exists(real)
        except ValueError:  # a zero byte or half a surrogate pair
            real, there = name, False
        entry = _by_real_path.get(real)
        try:
            if entry is None:
                if not there:
                    raise MediaError(f"{name}: there is no such LMDB")
                if os.path.isdir(real) and not os.path.exists(os.path.join(real, "data.mdb")):
                    raise MediaError(f"{name}: is a folder without data.mdb, not an LMDB; name the file or folder of an LMDB")
                environment = lmdb.open(real, subdir=os.path.isdir(real), readonly=True, lock=False, readahead=False, create=False)
                try:
                    require_whole(environment, real)
                except MediaError:
                    environment.close()
                    raise
                entry = _by_real_path[real] = _Open(environment)
                _hook_fork()
            _by_name[path] = entry
            transaction = entry.environment.begin()
        except lmdb.Error as error:
            raise MediaError(f"{name}: can't be opened as an LMDB: {error}") from error
        entry.transactions.add(transaction)
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
    _by_name.clear()  # first: a thread that reads in a loop then waits for the lock instead of taking the transaction again
    while _by_real_path:
        _, entry = _by_real_path.popitem()
        held: list[Any] = []
        while len(held) < len(entry.transactions):
            try:
                held.append(entry.idle.pop())
            except IndexError:
                time.sleep(0.0002)  # a read is running; it returns its transaction within microseconds
        for transaction in held:
            with contextlib.suppress(lmdb.Error):
                transaction.abort()
        with contextlib.suppress(lmdb.Error):
            entry.environment.close()
