"""Images into an LMDB: from folders, tar or Parquet shards, resumable after a kill, verified against a manifest.

Values go to `<out>.partial`; each commit stores how far it got, so that an interrupted build goes on from there. At the end everything is
read back, `manifest.json` records count, bytes and an order-free digest, and the folder takes its final name in one step.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from . import lmdb_store
from .images import image_size
from .limits import DEFAULT_LIMITS, Limits, MediaError

MANIFEST = "manifest.json"
_STATE = b"\0eagle-build"  # no image key begins with a zero byte
_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))


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

    sources: folders (key: path below the folder), `.tar` shards (key: member name), `.parquet` shards with a binary column or a struct
    with `bytes` (key: the `key`, `path`, `name` or `id` column, or else shard:row; needs pyarrow), or image files (key: file name).
    check_images: refuse values whose header gives no size. Refused values, and keys that come twice with different values, are listed
    in `problems` and left out. Called again after an interruption with the same sources, it goes on where the last commit was.
    Raises FileExistsError when `out` exists, ValueError after an interrupted build of other sources, MediaError for a source it can't read.
    """
    names = [os.fspath(source) for source in sources]
    target, partial = Path(out), Path(os.fspath(out) + ".partial")
    if target.exists():
        raise FileExistsError(f"{target}: exists already; remove it, or choose another name")
    result = BuildResult(str(target))
    partial.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(partial), map_size=1 << 30, subdir=True, meminit=False, max_readers=4) as environment:
        state = _resume(environment, names, partial)
        result.written, result.bytes, result.resumed = state["written"], state["bytes"], state["written"]
        result.problems = [(key, reason) for key, reason in state["problems"]]
        pending: list[tuple[bytes, bytes]] = []
        size = 0
        for number, (source, key, value) in enumerate(_values(names)):
            if number < state["done"]:
                continue
            state["done"] = number + 1
            reason = _refusal(key, value, check_images, limits)
            if reason is None:
                pending.append((key.encode(), value))
                size += len(value)
            else:
                result.problems.append((key, reason))
            if size >= commit_bytes or len(pending) >= 10_000:
                _commit(environment, pending, state, result)
                pending, size = [], 0
                if progress is not None:
                    progress(Progress(state["done"], result.bytes, source))
        _commit(environment, pending, state, result)
        digest = _digest(environment, result)
        with environment.begin(write=True) as transaction:
            transaction.delete(_STATE)
        environment.sync(True)
    (partial / "lock.mdb").unlink(missing_ok=True)
    manifest = {"keys": result.written, "bytes": result.bytes, "digest": digest, "problems": len(result.problems)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(partial, target)
    if progress is not None:
        progress(Progress(state["done"], result.bytes, ""))
    return result


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
        for key, value in lmdb_store.items(name):
            result.keys += 1
            result.bytes += len(value)
            total = total + _hash(key, value) & (1 << 64) - 1
            reason = _refusal(key.decode(errors="replace"), value, images, limits) if images else None
            if reason is not None:
                result.problems.append((key.decode(errors="replace"), reason))
            if progress is not None and result.keys % 10_000 == 0:
                progress(Progress(result.keys, result.bytes, name))
    except MediaError as error:
        if result.keys == 0:
            raise
        result.problems.append(("", str(error)))
    manifest_path = Path(name) / MANIFEST
    if manifest_path.is_file():
        manifest = json.loads(manifest_path.read_text())
        for what, found in (("keys", result.keys), ("bytes", result.bytes), ("digest", f"{total:016x}")):
            if manifest.get(what) != found:
                result.problems.append(("", f"the manifest says {what} = {manifest.get(what)}, the file has {found}"))
    return result


def _refusal(key: str, value: bytes, check: bool, limits: Limits) -> str | None:
    try:
        limits.check_bytes(len(value), key)
        if check:
            limits.check_size(*image_size(value), key)
    except MediaError as error:
        return str(error)
    if not key or key.startswith("\0") or len(key.encode()) > 511:
        return "an LMDB key has 1 to 511 bytes and doesn't begin with a zero byte"
    return None


def _resume(environment: Any, names: list[str], partial: Path) -> dict[str, Any]:
    with environment.begin() as transaction:
        stored = transaction.get(_STATE)
    if stored is None:
        return {"sources": names, "done": 0, "written": 0, "bytes": 0, "problems": []}
    state = json.loads(stored)
    if state["sources"] != names:
        others = ", ".join(state["sources"][:3])
        raise ValueError(f"{partial}: is an interrupted build of other sources ({others}); remove it to begin anew")
    return state


def _commit(environment: Any, pending: list[tuple[bytes, bytes]], state: dict[str, Any], result: BuildResult) -> None:
    """All of `pending` and how far we are, in one transaction; the map grows as needed."""
    while True:
        written, size, problems = result.written, result.bytes, list(result.problems)
        try:
            with environment.begin(write=True) as transaction:
                for key, value in pending:
                    if transaction.put(key, value, overwrite=False):
                        written += 1
                        size += len(value)
                    elif transaction.get(key) != value:
                        problems.append((key.decode(), "this key came before with another value, which was kept"))
                state.update(written=written, bytes=size, problems=problems)
                transaction.put(_STATE, json.dumps(state).encode())
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
            continue
        result.written, result.bytes, result.problems = written, size, problems
        return


def _digest(environment: Any, result: BuildResult) -> str:
    """Sum of the hashes of all values as they are read back. Raises MediaError when fewer or other bytes come back than went in."""
    total = keys = size = 0
    with environment.begin(buffers=True) as transaction, transaction.cursor() as cursor:
        for key, value in cursor.iternext(keys=True, values=True):
            if bytes(key) == _STATE:
                continue
            total = total + _hash(bytes(key), value) & (1 << 64) - 1
            keys += 1
            size += len(value)
    if (keys, size) != (result.written, result.bytes):
        went, came = f"{result.written} values of {result.bytes} bytes", f"{keys} of {size}"
        raise MediaError(f"{result.path}: {went} went in, {came} came back; the disk is failing")
    return f"{total:016x}"


def _hash(key: bytes, value: Any) -> int:
    digest = hashlib.blake2b(value, digest_size=8, key=hashlib.blake2b(key, digest_size=16).digest())
    return int.from_bytes(digest.digest(), "big")


def _values(names: Iterable[str]) -> Iterator[tuple[str, str, bytes]]:
    """(source, key, value) of everything, always in the same order."""
    for name in names:
        path = Path(name)
        if path.is_dir():
            for file in sorted(found for found in path.rglob("*") if found.suffix.lower() in _SUFFIXES and found.is_file()):
                yield name, file.relative_to(path).as_posix(), file.read_bytes()
        elif path.suffix == ".tar":
            yield from ((name, key, value) for key, value in _tar(path))
        elif path.suffix == ".parquet":
            yield from ((name, key, value) for key, value in _parquet(path))
        elif path.suffix.lower() in _SUFFIXES and path.is_file():
            yield name, path.name, path.read_bytes()
        else:
            raise MediaError(f"{name}: is no folder, image, .tar or .parquet file")


def _tar(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() and Path(member.name).suffix.lower() in _SUFFIXES else None
                if file is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, OSError) as error:
        raise MediaError(f"{path}: can't be read as a tar file: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        types = importlib.import_module("pyarrow").types
    except ImportError as error:
        raise MediaError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    file = parquet.ParquetFile(path)
    schema = file.schema_arrow

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    column = next((f.name for f in schema if binary(f.type)), None)
    nested = next((f.name for f in schema if types.is_struct(f.type) and any(c.name == "bytes" and binary(c.type) for c in f.type)), None)
    if column is None and nested is None:
        raise MediaError(f"{path}: has no column of bytes; its columns are {', '.join(schema.names)}")
    keys = next((name for name in ("key", "path", "name", "id") if name in schema.names), None)
    wanted = [name for name in (column or nested, keys) if name is not None]
    row = 0
    for batch in file.iter_batches(batch_size=64, columns=wanted):
        for item in batch.to_pylist():
            value = item[wanted[0]]
            inner = value if isinstance(value, dict) else {"bytes": value}
            key = str(item[keys]) if keys is not None else inner.get("path") or f"{path.stem}:{row}"
            yield key, inner["bytes"] or b""
            row += 1
