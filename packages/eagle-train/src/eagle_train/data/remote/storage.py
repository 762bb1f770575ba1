"""Remote files through fsspec: their versions, ranges of bytes and names, with attempts again and errors that say what to do.

Credentials are found by the libraries in the environment's standard places and are never seen here; messages are made of the status of an
answer and the name of an error, not of requests, which have headers.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from eagle_sampling import MediaError, MediaUnavailable
from eagle_train.config import ConfigError, RemoteConfig
from eagle_train.config.addresses import fixed_part, is_pattern, scheme_of, without_secrets
from eagle_train.errors import BAD_DATA

logger = logging.getLogger(__name__)

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
_INSTALL = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "oci": "ocifs"}
_MISSING, _DENIED, _CHANGED = frozenset({404, 410}), frozenset({401, 403}), frozenset({412})
_PASSING = frozenset({408, 423, 425, 429, *range(500, 600)})
_NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "DefaultCredentialsError"}
)
_TAGS = (
    "ETag",
    "etag",
    "blob_id",
    "md5Hash",
    "generation",
    "VersionId",
    "LastModified",
    "Last-Modified",
    "mtime",
    "modified",
    "last_commit",
)
_CUT = "the answer is cut off"
_SAID = {
    "gaierror": "no host has this name",
    "ConnectionRefusedError": "the connection is refused",
    "TimeoutError": "no answer in time",
    "FSTimeoutError": "no answer in time",
    "ReadTimeoutError": "no answer in time",
    "ConnectTimeoutError": "no answer in time",
    "ServerDisconnectedError": "the server closed the connection",
    "ConnectionResetError": "the server closed the connection",
}
_IN_FOLDERS = (".parquet", ".arrow", ".tar")


class StorageError(MediaUnavailable):
    """Storage that doesn't answer, or can't be used without credentials: it says nothing about the rows, so reading them stops."""

    exit_code = BAD_DATA


class _Passing(Exception):
    """An answer of fewer bytes than were asked for."""


class Handle:
    """A version of a remote file. version: (size, ETag or time of modification)."""

    def __init__(self, storage: Storage, address: str, file: Any, version: tuple[int, str]) -> None:
        self.storage, self.address, self.file, self.version = storage, address, file, version
        self.opened = time.monotonic()
        self._lock = threading.Lock()

    def age(self) -> float:
        """Seconds since its version was asked for."""
        return time.monotonic() - self.opened

    def fetch(self, start: int, end: int) -> bytes:
        """Bytes start ... end - 1; raises MediaError when the file is not what it was, StorageError when it can't be reached."""

        def once() -> bytes:
            with self._lock:
                self.file.seek(start)
                data = self.file.read(end - start)
            if len(data) != end - start:
                raise _Passing
            return data

        try:
            return self.storage.repeated(self.address, once)
        except _Short:
            raise MediaError(
                f"{without_secrets(self.address)}: the answer for bytes {start} to {end - 1} is cut off, in each of "
                f"{self.storage.config.retries + 1} attempts; if the file was replaced, run again"
            ) from None


class _Short(Exception):
    """The same, in every attempt."""


class Storage:
    """The file systems of the schemes of a configuration, in one process."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self._systems: dict[str, Any] = {}
        self._random = random.Random()  # waits of processes should differ, and training's generator stay as it is
        self._lock = threading.Lock()

    def open(self, address: str) -> Handle:
        """The file at an address, in the version that is there now. Raises MediaError and StorageError."""
        system = self._system(address)
        http = scheme_of(address) in ("http", "https")

        def once() -> tuple[Any, tuple[int, str]]:
            if not http:
                file = system.open(address, "rb", cache_type="none")
                return file, _version(file.details, address)
            info = system.info(address)
            size, tag = _version(info, address)
            etag = info.get("ETag") or ""
            headers = {"Accept-Encoding": "identity"} | ({"If-Match": etag} if etag.startswith('"') else {})
            return system.open(address, "rb", size=size, block_size=1 << 16, cache_type="none", headers=headers), (size, tag)

        file, version = self.repeated(address, once)
        return Handle(self, address, file, version)

    def names(self, address: str) -> list[str]:
        """The files that an address, a pattern or a folder stands for, sorted; raises ConfigError when there is none."""
        system, shown = self._system(address), without_secrets(address)
        scheme = scheme_of(address)
        if is_pattern(address):
            found = self.repeated(address, lambda: system.glob(address))
            if not found:
                raise ConfigError(f"annotation pattern {shown} matches no file; check it, and that the storage lists {fixed_part(address)}")
        elif self.is_folder(address):
            listed = self.repeated(address, lambda: system.find(address))
            found = next((some for suffix in _IN_FOLDERS if (some := [one for one in listed if one.endswith(suffix)])), [])
            if not found:
                raise ConfigError(f"annotation folder {shown} has no files that end in {', '.join(_IN_FOLDERS)}")
        else:
            try:
                self.open(address)
            except MediaError as error:
                raise ConfigError(f"annotation file {error}") from error
            return [address]
        return sorted(one if scheme_of(one) else f"{scheme}://{one}" for one in found)

    def is_folder(self, address: str) -> bool:
        if address.endswith("/"):
            return True
        if scheme_of(address) in ("http", "https"):  # asking would read the file
            return False
        system = self._system(address)
        return bool(self.repeated(address, lambda: system.isdir(address)))

    def repeated(self, address: str, work: Callable[[], T]) -> T:
        """What `work` returns, attempted again after failures that may pass."""
        shown = without_secrets(address)
        for attempt in range(self.config.retries + 1):
            try:
                return work()
            except (MediaError, MediaUnavailable, ConfigError):
                raise
            except Exception as error:
                reason = _reason(error, shown, self.config)
                if attempt == self.config.retries:
                    if reason.startswith(_CUT):
                        raise _Short from None
                    raise StorageError(
                        f"{shown}: can't be reached ({reason}) after {attempt + 1} attempts; what is done is kept: check the network and "
                        "run again"
                    ) from None
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * self._random.uniform(0.5, 1.0)
            logger.warning("%s: %s; attempt %d of %d in %.1f s", shown, reason, attempt + 2, self.config.retries + 1, wait)
            time.sleep(wait)
        raise AssertionError

    def _system(self, address: str) -> Any:
        scheme = scheme_of(address) or ""
        with self._lock:
            if scheme not in self._systems:
                self._systems[scheme] = self._made(scheme)
            return self._systems[scheme]

    def _made(self, scheme: str) -> Any:
        import fsspec

        kind = fsspec.get_filesystem_class(scheme)
        # skip_instance_cache: the instance is ours, since its settings are.
        system = kind(skip_instance_cache=True, use_listings_cache=False, **self._options(scheme))
        if scheme in ("s3", "s3a"):
            system.retries = 1  # attempts are made here, for all schemes alike
        return system

    def _options(self, scheme: str) -> dict[str, Any]:
        timeout = self.config.timeout
        if scheme in ("http", "https"):
            import aiohttp

            # trust_env: proxies of the environment, and ~/.netrc.
            return {
                "client_kwargs": {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)}
            }
        if scheme in ("s3", "s3a"):
            settings = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
            return {"anon": self.config.anonymous, "endpoint_url": self.config.endpoint_url, "config_kwargs": settings}
        if scheme in ("gs", "gcs"):
            return {"token": "anon"} if self.config.anonymous else {}
        return {}


def check_installed(scheme: str) -> None:
    """Raise ConfigError when no library reads the scheme; nothing is imported but fsspec's list, since s3fs takes seconds."""
    install = f"data.remote.schemes: reading {scheme}:// needs a library that is not installed"
    try:
        from fsspec.registry import known_implementations, registry
    except ImportError as error:
        raise ConfigError(f"{install}: pip install 'eagle-train[remote]'") from error
    if scheme in registry:
        return
    if scheme not in known_implementations:
        raise ConfigError(f"data.remote.schemes: {scheme} is not a scheme that fsspec knows")
    module = known_implementations[scheme]["class"].partition(".")[0]
    needed = "aiohttp" if scheme in ("http", "https") else module
    if importlib.util.find_spec(needed) is None:
        library = _INSTALL.get(scheme, "'eagle-train[remote]'")
        raise ConfigError(f"{install}: pip install {library}")


def _version(info: dict[str, Any], address: str) -> tuple[int, str]:
    size = info.get("size")
    if info.get("type") == "directory":
        raise MediaError(f"{without_secrets(address)}: is a folder, not a file")
    if size is None or info.get("partial") is False:
        problem = "the server doesn't state its size" if size is None else "the server doesn't send ranges of bytes"
        raise MediaError(f"{without_secrets(address)}: {problem}, so that parts of it can't be read; download it, or use another server")
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    return int(size), tag


def _reason(error: Exception, shown: str, config: RemoteConfig) -> str:
    """Why a request failed, if it may pass; raises MediaError or StorageError if it won't."""
    chain = list(_chain(error))
    status = next((status for one in chain if (status := _status(one)) is not None), None)
    names = {type(one).__name__ for one in chain}
    if status in _DENIED or (status is None and isinstance(error, PermissionError)):
        hint = "data.remote.anonymous reads public buckets" if not config.anonymous else "data.remote.anonymous is set"
        number = f" ({status})" if status else ""
        raise MediaError(
            f"{shown}: access is denied{number}; check that it exists, and the credentials of the environment "
            f"(AWS_*, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc); {hint}"
        ) from PermissionError(shown)
    if names & _NO_CREDENTIALS:
        raise StorageError(
            f"{shown}: no credentials are found in the environment's standard places (AWS_*, ~/.aws, an instance role; "
            "GOOGLE_APPLICATION_CREDENTIALS); set them, or data.remote.anonymous: true for a public bucket"
        ) from None
    if status in _CHANGED or "FileExpired" in names:
        raise MediaError(f"{shown}: changed while it was being read (its ETag is another one); run again") from None
    if status in _MISSING or (status is None and isinstance(error, FileNotFoundError) and not names & {"ClientConnectorError"}):
        if not any(_passes(one) for one in chain[1:]):
            raise MediaError(f"{shown}: is not there ({status or 'no such file'}); check the address") from FileNotFoundError(shown)
    if status is not None and status not in _PASSING:
        raise MediaError(f"{shown}: can't be read: the server answers {status}") from None
    if isinstance(error, ValueError) and "range requests" in str(error):
        raise MediaError(f"{shown}: the server doesn't send ranges of bytes; download it, or use another server") from None
    if isinstance(error, _Passing) or names & {"ContentLengthError", "ClientPayloadError", "IncompleteRead", "IncompleteReadError"}:
        return _CUT
    if status is None and not any(isinstance(one, OSError | TimeoutError) or _passes(one) for one in chain):
        raise error
    if status is not None:
        return f"the server answers {status}"
    return next((said for name, said in _SAID.items() if name in names), type(chain[-1]).__name__)


def _passes(error: BaseException) -> bool:
    """Whether an error is one of the connection."""
    return isinstance(error, TimeoutError | ConnectionError) or any(
        kind.__name__
        in (
            "ClientConnectionError",
            "ClientPayloadError",
            "FSTimeoutError",
            "HTTPClientError",
            "BotoConnectionError",
            "IncompleteReadError",
        )
        or kind.__name__ in ("ConnectionError", "Timeout", "TransportError", "ResponseStreamingError", "IncompleteRead")
        for kind in type(error).__mro__
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _status(error: BaseException) -> int | None:
    """Status of the answer that an error of aiohttp, botocore, requests, httpx or gcsfs is about."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(answer, "status_code", None) or getattr(error, "status", None)
        if type(error).__name__ == "HttpError":  # of gcsfs; aiohttp says 400 of an answer that is cut off
            found = found or getattr(error, "code", None)
    return found if isinstance(found, int) and 100 <= found < 600 else None
