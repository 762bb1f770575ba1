"""Build an LMDB of images from folders, tar and Parquet shards, resumable after a kill and verified against a manifest; check one.

Values go to `<out>.partial`, and each commit stores how far the build is, so that an interrupted build continues there. At the end all
values are read back, `manifest.json` records count, bytes, an order-free digest and what was not stored, and the folder is renamed.
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
from .sources import NotAnImage, Value, read_sources

MANIFEST = "manifest.json"
_STATE = b"\0eagle-build"  # no image key begins with a zero byte


@dataclass(frozen=True)
class Progress:
    """done: values seen so far (written or refused); bytes: written so far; source: the one that is read now."""

    done: int
    bytes: int
    source: str


@dataclass
class BuildResult:
    """What a build made.

    written: values in the LMDB; bytes: their size; resumed: values that an earlier, interrupted build stored; problems: (key, reason) of
    what was left out; others: files that are not images by name or content, as kind -> (how many, one of them), where the kind is the end
    of their names; example: one key; complete_already: nothing was done, because the LMDB of these sources exists.
    """

    path: str
    written: int = 0
    bytes: int = 0
    resumed: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    others: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    example: str = ""
    complete_already: bool = False

    @property
    def reference(self) -> dict[str, str]:
        """The value by which a row names an image of this LMDB, for the example key."""
        return {"lmdb_file": self.path, "lmdb_key": self.example}

    def __str__(self) -> str:
        kept = f" ({self.resumed} of them by an earlier run)" if self.resumed else ""
        state = "complete already: " if self.complete_already else ""
        count = sum(number for number, _ in self.others.values())
        kinds = "; ".join(f"{number} x {kind}, for example {name}" for kind, (number, name) in sorted(self.others.items())[:20])
        others = f"\n{count} other files are not images: {kinds}" if count else ""
        return (
            f"{state}{_counted(self.written, 'value')}, {self.bytes / 1e6:.1f} MB{kept}, {len(self.problems)} left out{others}\n"
            f"A row names an image as {json.dumps(self.reference, ensure_ascii=False)}"
        )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass
class CheckResult:
    """Keys and bytes that a check found, and problems as (key, reason); `ok` when there are none."""

    path: str
    keys: int = 0
    bytes: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return f"{_counted(self.keys, 'value')}, {self.bytes / 1e6:.1f} MB, {_counted(len(self.problems), 'problem')}"


@dataclass
class _State:
    """How far a build is. done: values seen; chain: a hash of their keys and sizes in order; written, bytes: content of the LMDB."""

    sources: list[str]
    done: int = 0
    chain: str = ""
    written: int = 0
    bytes: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    others: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    column: str | None = None
    finished: bool = False


def build_lmdb(
    out: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    *,
    column: str | None = None,
    check_images: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    commit_bytes: int = 64 << 20,
    progress: Callable[[Progress], None] | None = None,
) -> BuildResult:
    """Store every image of `sources` under its key in the new LMDB folder `out`.

    sources: folders (key: path below the folder, links followed), image files (key: file name), `.tar` shards (key: member name),
    `.parquet` shards with a binary column or a struct with `bytes` (key: the `key`, `path`, `name` or `id` column, otherwise shard:row).
    A file is an image by its content, whatever its name; files that are not are counted by kind (`BuildResult.others`).
    column: that of the images in Parquet shards; needed where several could be.
    check_images: refuse values whose header gives no size. Refused values, sources without an image, and keys that occur twice with
    different values are listed in `problems` and left out. After an interruption the same call continues at the last commit, if what it
    had seen is still what the sources begin with. If `out` was built from sources of the same names, nothing is done
    (`BuildResult.complete_already`); changes inside them are not looked for.

    Raises:
        FileExistsError: `out` exists and is not an LMDB that was built from these sources.
        MediaError: a source cannot be read to its end, the disk cannot be written to, there is nothing to store, or an interrupted build
            has other sources or its sources have changed.
        TypeError: `sources` is one path instead of a list.
    """
    if isinstance(sources, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"sources is {os.fspath(sources)!r}: need a list of folders and files, [{os.fspath(sources)!r}]")
    names = [os.fspath(source) for source in sources]
    target, partial = Path(out), Path(os.fspath(out) + ".partial")
    if target.exists():
        return _existing(target, names, column)
    partial.mkdir(parents=True, exist_ok=True)
    with _writing(partial) as environment:
        state = _resume(environment, names, column, partial)
        resumed = state.written
        pending: list[tuple[bytes, bytes]] = []
        size = 0
        for source, key, value in _unseen(state, partial):
            stored, shown = _lmdb_key(key), key.encode(errors="backslashreplace").decode()
            if isinstance(value, NotAnImage):
                kind = os.path.splitext(shown)[1].lower() or "without a suffix"
                number, first = state.others.get(kind, (0, shown))
                state.others[kind] = (number + 1, first)
                continue
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
        example = _first_key(environment)
    (partial / "lock.mdb").unlink(missing_ok=True)
    if not state.written:
        _remove(partial)
        first = "".join(f": {key}: {reason}" for key, reason in state.problems[:1])
        raise MediaError(f"{target}: not made: there is nothing to store, {len(state.problems)} left out{first}")
    os.replace(partial, target)
    if progress is not None:
        progress(Progress(state.done, state.bytes, ""))
    return BuildResult(str(target), state.written, state.bytes, resumed, state.problems, state.others, example)


def _existing(target: Path, names: list[str], column: str | None) -> BuildResult:
    """The result of the finished build at `target`. Raises FileExistsError when it is not one of these sources."""
    manifest = _read_manifest(target)
    if manifest is None:
        raise FileExistsError(f"{target}: exists already; remove it, or choose another name")
    if manifest["sources"] != _fingerprint(names, column):
        raise FileExistsError(f"{target}: exists already and was built from other sources; remove it, or choose another name")
    problems = [(key, reason) for key, reason in manifest["problems"]]
    example = next(store.items(target), (b"", b""))[0].decode()
    others = {kind: (number, name) for kind, (number, name) in manifest["others"].items()}
    return BuildResult(str(target), manifest["keys"], manifest["bytes"], 0, problems, others, example, complete_already=True)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished build, or None when there is none that is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        # A manifest of version 0.1 does not count other files.
        return {"others": {}, **manifest} if {"keys", "bytes", "digest", "problems", "sources"} <= manifest.keys() else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def check_lmdb(
    path: str | os.PathLike[str],
    *,
    images: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[Progress], None] | None = None,
) -> CheckResult:
    """Read every value back, compare with the manifest (if `build_lmdb` made the file), and (`images`) read each image's size.

    Raises MediaError when the file cannot be opened.
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
            stated = {what: manifest[what] for what in ("keys", "bytes", "digest")}
        except (OSError, ValueError, LookupError, TypeError) as error:
            result.problems.append(("", f"{manifest_path}: is damaged, so that missing values are not noticed: {error!r}"))
        else:
            found = {"keys": result.keys, "bytes": result.bytes, "digest": f"{total:016x}"}
            for what, value in stated.items():
                if value != found[what]:
                    result.problems.append(("", f"the manifest states {what} = {value}, the file has {found[what]}"))
    return result


@contextlib.contextmanager
def _writing(partial: Path) -> Iterator[Any]:
    try:
        with lmdb.open(str(partial), map_size=1 << 30, subdir=True, meminit=False, max_readers=4) as environment:
            store.require_whole(environment, str(partial))
            yield environment
    except lmdb.Error as error:  # a full disk, above all
        raise MediaError(f"{partial}: {error}; the same call continues here once that is repaired; to start over, remove it") from error


def _refusal(name: str, value: Value, check: bool, limits: Limits) -> str | None:
    """Why `value` is not stored, or None."""
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
    """`key` in bytes, or None when it is not a valid LMDB key."""
    try:
        encoded = key.encode()
    except UnicodeEncodeError:  # a file name that isn't UTF-8
        return None
    return encoded if 1 <= len(encoded) <= 511 and encoded[0] else None


def _resume(environment: Any, names: list[str], column: str | None, partial: Path) -> _State:
    """State of an interrupted build of the same sources, or the initial one. Raises MediaError when it is a build of other sources."""
    with environment.begin() as transaction:
        stored = transaction.get(_STATE)
    if stored is not None:
        state = _State(**json.loads(stored))
        if state.sources != names or state.column != column:
            others = ", ".join(state.sources[:3]) + (f", column {state.column}" if state.column else "")
            raise MediaError(f"{partial}: is an interrupted build of other sources ({others}); to start over, remove it")
    elif environment.stat()["entries"] == 0:
        return _State(names, column=column)
    else:  # only the rename is missing: the state is deleted once the manifest is on the disk
        manifest = _read_manifest(partial)
        if manifest is None:
            raise MediaError(f"{partial}: holds values but no record of a build; to start over, remove it")
        if manifest["sources"] != _fingerprint(names, column):
            raise MediaError(f"{partial}: is a build of other sources that only lacks its final name; rename it, or remove it")
        state = _State(names, 0, "", manifest["keys"], manifest["bytes"], manifest["problems"], manifest["others"], column, True)
    state.problems = [(key, reason) for key, reason in state.problems]
    state.others = {kind: (number, name) for kind, (number, name) in state.others.items()}
    return state


def _unseen(state: _State, partial: Path) -> Iterator[tuple[str, str, Value]]:
    """(source, key, value) of what `state` has not seen; updates `state`. Raises MediaError when what it had seen has changed."""
    if state.finished:
        return
    chain, number, seen = "", 0, state.done
    changed = MediaError(
        f"{partial}: the sources have changed since this build was interrupted: of the {seen} values that it had seen, some were added, "
        f"removed or rewritten; to start over, remove {partial}, or undo the change"
    )
    for number, (source, key, value) in enumerate(read_sources(state.sources, state.column), 1):
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
    """Write `pending` and the state in one transaction; the map grows as needed."""
    while True:
        written, size, problems = state.written, state.bytes, list(state.problems)
        try:
            with environment.begin(write=True) as transaction:
                for key, value in pending:
                    if transaction.put(key, value, overwrite=False):
                        written += 1
                        size += len(value)
                    elif transaction.get(key) != value:
                        problems.append((key.decode(), "this key occurred before with another value, which was kept"))
                record = {**vars(state), "written": written, "bytes": size, "problems": problems}
                transaction.put(_STATE, json.dumps(record).encode())
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
            continue
        state.written, state.bytes, state.problems = written, size, problems
        return


def _finish(environment: Any, state: _State, partial: Path) -> None:
    """Read all values back and write the manifest; the state is deleted once that is on the disk, and only the rename remains."""
    manifest = {
        "keys": state.written,
        "bytes": state.bytes,
        "digest": _digest(environment, state, partial),
        "problems": state.problems,
        "others": state.others,
        "sources": _fingerprint(state.sources, state.column),
    }
    with open(partial / MANIFEST, "w") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    with environment.begin(write=True) as transaction:
        transaction.delete(_STATE)
    environment.sync(True)


def _remove(partial: Path) -> None:
    """Remove a build without values, but no other files in its folder."""
    for name in ("data.mdb", MANIFEST):
        (partial / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        partial.rmdir()


def _digest(environment: Any, state: _State, partial: Path) -> str:
    """Sum of the hashes of all values as they are read back. Raises MediaError when their number or size differs from what was written."""
    total = keys = size = 0
    with environment.begin(buffers=True) as transaction, transaction.cursor() as cursor:
        for key, value in cursor.iternext(keys=True, values=True):
            if bytes(key) == _STATE:
                continue
            total = total + _hash(bytes(key), value) & (1 << 64) - 1
            keys += 1
            size += len(value)
    if (keys, size) != (state.written, state.bytes):
        written = f"{state.written} values of {state.bytes} bytes"
        raise MediaError(f"{partial}: {written} were written, {keys} of {size} were read back; the disk is failing")
    return f"{total:016x}"


def _first_key(environment: Any) -> str:
    with environment.begin() as transaction, transaction.cursor() as cursor:
        return next((key.decode() for key in cursor.iternext(keys=True, values=False) if key != _STATE), "")


def _hash(key: bytes, value: Any) -> int:
    digest = hashlib.blake2b(value, digest_size=8, key=hashlib.blake2b(key, digest_size=16).digest())
    return int.from_bytes(digest.digest(), "big")


def _fingerprint(names: list[str], column: str | None) -> str:
    """A hash of the sources' names: the manifest may be published, the names need not be."""
    what = names if column is None else [*names, {"column": column}]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
