"""Images into an LMDB: from folders, tar or Parquet shards, resumable after a kill, verified against a manifest.

Values go to `<out>.partial`; each commit stores how far it got, so that an interrupted build goes on from there. At the end everything is
read back, `manifest.json` records count, bytes, an order-free digest and what was left out, and the folder gets its final name in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from ..images import image_size
from ..limits import DEFAULT_LIMITS, Limits, MediaError
from . import store
from .sources import Value, read_sources

MANIFEST = "manifest.json"
_STATE = b"\0eagle-build"  # no image key begins with a zero byte


@dataclass(frozen=True)
class Progress:
    """done: values seen so far (written or refused), bytes: written so far, source: what is being read."""

    done: int
    bytes: int
    source: str


@dataclass
class BuildResult:
    """written: values in the LMDB, bytes: their size, resumed: values an earlier, interrupted build had stored; problems: (key, reason)."""

    path: str
    written: int = 0
    bytes: int = 0
    resumed: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        kept = f" ({self.resumed} of them by an earlier run)" if self.resumed else ""
        return f"{self.written} values, {self.bytes / 1e6:.1f} MB{kept}, {len(self.problems)} left out"


@dataclass
class CheckResult:
    """keys and bytes found, problems as (key, reason); `ok` when there are none."""

    path: str
    keys: int = 0
    bytes: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return f"{self.keys} values, {self.bytes / 1e6:.1f} MB, {len(self.problems)} problems"


@dataclass
class _State:
    """How far a build got. done: values seen, chain: a hash of their keys and sizes in order; written, bytes: what the LMDB holds."""

    sources: list[str]
    done: int = 0
    chain: str = ""
    written: int = 0
    bytes: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    finished: bool = False


def build_lmdb(
    out: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    *,
    check_images: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    commit_bytes: int = 64 << 20,
    progress: Callable[[Progress], None] | None = None,
) -> BuildResult:
    """Store every image of `sources` under its key in the new LMDB folder `out`.

    sources: folders (key: path below the folder, links followed), image files (key: file name), `.tar` shards (key: member name),
    `.parquet` shards with a binary column or a struct with `bytes` (key: the `key`, `path`, `name` or `id` column, or else shard:row).
    check_images: refuse values whose header gives no size. Refused values, sources without an image, and keys that come twice with
    different values are listed in `problems` and left out. Called again after an interruption with the same sources, it goes on where the
    last commit was, if what it had seen is still what the sources begin with.
    Raises FileExistsError when `out` exists, ValueError after an interrupted build of other sources or of what they were before a change,
    MediaError for a source that can't be read to its end, a disk that can't be written to, or when there is nothing to store.
    """
    names = [os.fspath(source) for source in sources]
    target, partial = Path(out), Path(os.fspath(out) + ".partial")
    if target.exists():
        raise FileExistsError(f"{target}: exists already; remove it, or choose another name")
    partial.mkdir(parents=True, exist_ok=True)
    with _writing(partial) as environment:
        state = _resume(environment, names, partial)
        resumed = state.written
        pending: list[tuple[bytes, bytes]] = []
        size = 0
        for source, key, value in _unseen(state, partial):
            stored, shown = _lmdb_key(key), key.encode(errors="backslashreplace").decode()
            reason = _refusal(shown, value, check_images, limits)
            if reason is None and stored is None:
                reason = "an LMDB key has 1 to 511 bytes, is UTF-8 and doesn't begin with a zero byte; rename it"
            if reason is not None:
                state.problems.append((shown, reason))
            elif isinstance(value, bytes) and stored is not None:
                pending.append((stored, value))
                size += len(value)
            if size >= commit_bytes or len(pending) >= 10_000:
                _commit(environment, pending, state)
                pending, size = [], 0
                if progress is not None:
                    progress(Progress(state.done, state.bytes, source))
        if not state.finished:
            _commit(environment, pending, state)
            _finish(environment, state, partial)
    (partial / "lock.mdb").unlink(missing_ok=True)
    if not state.written:
        _remove(partial)
        first = "".join(f": {key}: {reason}" for key, reason in state.problems[:1])
        raise MediaError(f"{target}: not made: there is nothing to store, {len(state.problems)} left out{first}")
    os.replace(partial, target)
    if progress is not None:
        progress(Progress(state.done, state.bytes, ""))
    return BuildResult(str(target), state.written, state.bytes, resumed, state.problems)


def check_lmdb(
    path: str | os.PathLike[str],
    *,
    images: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[Progress], None] | None = None,
) -> CheckResult:
    """Read every value back: against the manifest (when `build_lmdb` made the file), and (`images`) each one's header for its size.

    Raises MediaError when the file can't be opened.
    """
    name = os.fspath(path)
    result = CheckResult(name)
    total = 0
    try:
        for key, value in store.items(name):
            result.keys += 1
            result.bytes += len(value)
            total = total + _hash(key, value) & (1 << 64) - 1
            shown = key.decode(errors="backslashreplace")
            reason = _refusal(shown, value, True, limits) if images else None
            if reason is not None:
                result.problems.append((shown, reason))
            if progress is not None and result.keys % 10_000 == 0:
                progress(Progress(result.keys, result.bytes, name))
    except MediaError as error:
        if result.keys == 0:
            raise
        result.problems.append(("", str(error)))
    manifest_path = Path(name) / MANIFEST
    if manifest_path.is_file():
        try:
            manifest = json.loads(manifest_path.read_text())
            claims = {what: manifest[what] for what in ("keys", "bytes", "digest")}
        except (OSError, ValueError, LookupError, TypeError) as error:
            result.problems.append(("", f"{manifest_path}: is damaged, so that missing values would go unnoticed: {error!r}"))
        else:
            found = {"keys": result.keys, "bytes": result.bytes, "digest": f"{total:016x}"}
            for what, claim in claims.items():
                if claim != found[what]:
                    result.problems.append(("", f"the manifest says {what} = {claim}, the file has {found[what]}"))
    return result


@contextlib.contextmanager
def _writing(partial: Path) -> Iterator[Any]:
    try:
        with lmdb.open(str(partial), map_size=1 << 30, subdir=True, meminit=False, max_readers=4) as environment:
            store.require_whole(environment, str(partial))
            yield environment
    except lmdb.Error as error:  # a full disk, above all
        raise MediaError(f"{partial}: {error}; once that is mended the same call goes on from here, or remove it to begin anew") from error


def _refusal(name: str, value: Value, check: bool, limits: Limits) -> str | None:
    """Why `value` is no image to store, or None."""
    if isinstance(value, MediaError):
        return str(value)
    try:
        limits.check_bytes(len(value), name)
        if check:
            limits.check_size(*image_size(value), name)
    except MediaError as error:
        return str(error)
    return None


def _lmdb_key(key: str) -> bytes | None:
    """`key` in bytes, or None when it can't be one."""
    try:
        encoded = key.encode()
    except UnicodeEncodeError:  # a file name that isn't UTF-8
        return None
    return encoded if 1 <= len(encoded) <= 511 and encoded[0] else None


def _resume(environment: Any, names: list[str], partial: Path) -> _State:
    """Where an interrupted build of the same sources was, or the beginning."""
    with environment.begin() as transaction:
        stored = transaction.get(_STATE)
    if stored is not None:
        state = _State(**json.loads(stored))
        if state.sources != names:
            others = ", ".join(state.sources[:3])
            raise ValueError(f"{partial}: is an interrupted build of other sources ({others}); remove it to begin anew")
    elif environment.stat()["entries"] == 0:
        return _State(names)
    else:  # all was done but the folder's new name: the state is deleted once the manifest is there
        try:
            manifest = json.loads((partial / MANIFEST).read_text())
            same = manifest["sources"] == _fingerprint(names)
            state = _State(names, 0, "", manifest["keys"], manifest["bytes"], manifest["problems"], finished=True)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{partial}: holds values but no record of a build; remove it to begin anew") from error
        if not same:
            raise ValueError(f"{partial}: is a build of other sources that only lacks its final name; rename it, or remove it")
    state.problems = [(key, reason) for key, reason in state.problems]
    return state


def _unseen(state: _State, partial: Path) -> Iterator[tuple[str, str, Value]]:
    """(source, key, value) of what `state`, which follows, hasn't seen. Raises ValueError when what it had seen isn't there as it was."""
    if state.finished:
        return
    chain, number, seen = "", 0, state.done
    changed = ValueError(
        f"{partial}: the sources have changed since this build was interrupted: of the {seen} values that it had seen, some were added, "
        f"removed or rewritten; remove {partial} to begin anew, or undo the change"
    )
    for number, (source, key, value) in enumerate(read_sources(state.sources), 1):
        size = len(value) if isinstance(value, bytes) else -1
        chain = hashlib.blake2b(f"{chain} {size} {key}".encode(errors="surrogatepass"), digest_size=16).hexdigest()
        if number == seen and chain != state.chain:
            raise changed
        if number > seen:
            state.done, state.chain = number, chain
            yield source, key, value
    if number < seen:
        raise changed


def _commit(environment: Any, pending: list[tuple[bytes, bytes]], state: _State) -> None:
    """All of `pending` and how far we are, in one transaction; the map grows as needed."""
    while True:
        written, size, problems = state.written, state.bytes, list(state.problems)
        try:
            with environment.begin(write=True) as transaction:
                for key, value in pending:
                    if transaction.put(key, value, overwrite=False):
                        written += 1
                        size += len(value)
                    elif transaction.get(key) != value:
                        problems.append((key.decode(), "this key came before with another value, which was kept"))
                record = {**vars(state), "written": written, "bytes": size, "problems": problems}
                transaction.put(_STATE, json.dumps(record).encode())
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
            continue
        state.written, state.bytes, state.problems = written, size, problems
        return


def _finish(environment: Any, state: _State, partial: Path) -> None:
    """Read everything back, write the manifest, and only when that is on the disk delete the state: then only a rename is left to do."""
    manifest = {
        "keys": state.written,
        "bytes": state.bytes,
        "digest": _digest(environment, state, partial),
        "problems": state.problems,
        "sources": _fingerprint(state.sources),
    }
    with open(partial / MANIFEST, "w") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    with environment.begin(write=True) as transaction:
        transaction.delete(_STATE)
    environment.sync(True)


def _remove(partial: Path) -> None:
    """Remove a build without values, and nothing that somebody else may have put into its folder."""
    for name in ("data.mdb", MANIFEST):
        (partial / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        partial.rmdir()


def _digest(environment: Any, state: _State, partial: Path) -> str:
    """Sum of the hashes of all values as they are read back. Raises MediaError when fewer or other bytes come back than went in."""
    total = keys = size = 0
    with environment.begin(buffers=True) as transaction, transaction.cursor() as cursor:
        for key, value in cursor.iternext(keys=True, values=True):
            if bytes(key) == _STATE:
                continue
            total = total + _hash(bytes(key), value) & (1 << 64) - 1
            keys += 1
            size += len(value)
    if (keys, size) != (state.written, state.bytes):
        went, came = f"{state.written} values of {state.bytes} bytes", f"{keys} of {size}"
        raise MediaError(f"{partial}: {went} went in, {came} came back; the disk is failing")
    return f"{total:016x}"


def _hash(key: bytes, value: Any) -> int:
    digest = hashlib.blake2b(value, digest_size=8, key=hashlib.blake2b(key, digest_size=16).digest())
    return int.from_bytes(digest.digest(), "big")


def _fingerprint(names: list[str]) -> str:
    """Says whether sources are the same without naming them in a file that may be given away."""
    return hashlib.blake2b(json.dumps(names).encode(), digest_size=8).hexdigest()
