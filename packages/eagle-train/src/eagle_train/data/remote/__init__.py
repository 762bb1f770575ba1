"""Files by address: which schemes this process reads, and what the readers of rows and media get for an address.

`enable` registers the schemes of a configuration with eagle_sampling, whose readers then open addresses like files. `storage` asks the file
systems of fsspec, `cache` keeps what was fetched.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from eagle_sampling.files import MediaStream, register_opener
from eagle_train.config import ConfigError, RemoteConfig
from eagle_train.config.addresses import scheme_of, without_secrets

from .cache import BLOCK, BlockCache, Entry
from .storage import Handle, Storage, check_installed

__all__ = ["RemoteFile", "enable", "names_of", "open_address", "version_of"]

_AT_ONCE = 128
"""Blocks of one request at most (8 MiB)."""
_HANDLES = 256
"""Files whose handle a process keeps."""


class _Remote:
    """What a process that reads addresses holds. Processes that are forked make their own: connections can't be shared."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self.process = os.getpid()
        self.storage = Storage(config)
        folder = config.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagle"
        self.cache = BlockCache(folder, config.cache_bytes)
        self.handles: OrderedDict[str, Handle] = OrderedDict()
        self.lock = threading.Lock()

    def handle(self, address: str, *, fresh: bool = False) -> Handle:
        with self.lock:
            handle = self.handles.get(address)
            if handle is not None and not fresh and handle.age() < self.config.check_after:
                self.handles.move_to_end(address)
                return handle
        handle = self.storage.open(address)
        with self.lock:
            self.handles[address] = handle
            self.handles.move_to_end(address)
            while len(self.handles) > _HANDLES:
                self.handles.popitem(last=False)
        return handle

    def forget(self, address: str) -> None:
        with self.lock:
            self.handles.pop(address, None)


_remote: _Remote | None = None


def enable(config: RemoteConfig) -> None:
    """Read the schemes of `config` in this process, and no others. Raises ConfigError for one that no library reads."""
    global _remote
    if _remote is not None and _remote.config == config and _remote.process == os.getpid():
        return
    for scheme in config.schemes:
        check_installed(scheme)
    for scheme in _remote.config.schemes if _remote is not None else ():
        register_opener(scheme, None)
    _remote = _Remote(config) if config.schemes else None
    for scheme in config.schemes:
        register_opener(scheme, open_address)


def _of_process() -> _Remote:
    global _remote
    if _remote is None:
        raise ConfigError("no scheme of remote files is read; name it in data.remote.schemes, for example [s3, https]")
    if _remote.process != os.getpid():
        _remote = _Remote(_remote.config)
    return _remote


def _checked(address: str) -> _Remote:
    remote = _of_process() if _remote is not None else None
    scheme = scheme_of(address)
    if remote is None or scheme not in remote.config.schemes:
        raise ConfigError(f"{without_secrets(address)}: {scheme}:// is not read; add {scheme} to data.remote.schemes")
    return remote


def open_address(address: str) -> RemoteFile:
    """The open file at an address. Raises MediaError when nothing can be read there, MediaUnavailable when the storage doesn't answer."""
    return RemoteFile(_checked(address), address)


def open_stream(address: str) -> MediaStream:
    """The file at an address as a binary stream; raises as `open_address`."""
    return MediaStream(open_address(address), address)


def version_of(address: str, *, fresh: bool = False) -> tuple[int, str]:
    """(size, ETag or time of modification) of a file, at most `data.remote.check_after` old, or asked now if `fresh`."""
    return _checked(address).handle(address, fresh=fresh).version


def names_of(address: str) -> list[str]:
    """The addresses that a pattern, or a folder that ends in `/`, stands for, sorted; else the address itself, if a file is there.

    Raises ConfigError when there is none, or the storage can't list (http servers).
    """
    return _checked(address).storage.names(address)


def is_folder(address: str) -> bool:
    """Whether an address is that of a folder; of http only what ends in `/`."""
    return _checked(address).storage.is_folder(address)


class RemoteFile:
    """A version of a remote file, as eagle_sampling reads it: blocks from the cache, the others by range requests."""

    def __init__(self, remote: _Remote, address: str) -> None:
        self._remote, self.address = remote, address
        self._handle = remote.handle(address)
        self.size, self.version = self._handle.version
        self._entry: Entry | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the file's end; raises MediaError and MediaUnavailable."""
        size = max(0, min(size, self.size - offset))
        if not size:
            return b""
        first, stop = offset // BLOCK, -(-(offset + size) // BLOCK)
        with self._lock:
            if self._entry is None:
                self._entry = self._remote.cache.entry(self.address, self.size, self.version)
            blocks = self._entry.load(first, stop)
            place = 0
            while place < len(blocks):
                if blocks[place] is not None:
                    place += 1
                    continue
                end = place
                while end < len(blocks) and blocks[end] is None and end - place < _AT_ONCE:
                    end += 1
                data = self._fetch((first + place) * BLOCK, min((first + end) * BLOCK, self.size))
                self._entry.store(first + place, data)
                blocks[place:end] = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
                place = end
        content = b"".join(block for block in blocks if block is not None)
        return content[offset - first * BLOCK : offset - first * BLOCK + size]

    def _fetch(self, start: int, end: int) -> bytes:
        try:
            return self._handle.fetch(start, end)
        except Exception:
            self._remote.forget(self.address)  # the next reader asks for its version again
            raise

    def close(self) -> None:
        with self._lock:
            if self._entry is not None:
                self._entry.close()
                self._entry = None
