"""WebDataset: tar files whose neighbouring members with one name and several suffixes are one row. An address is a range of bytes.

`cat.json` + `cat.jpg` is a row: what the JSON says, and the image. Text members (`cat.txt`) are columns with the suffix as the name. A JSON
that names media by the names of members gets these; media that it doesn't name are the row's `images`, `videos` and `documents` in order.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from eagle_train.config import ConfigError
from eagle_train.data.errors import RowError
from eagle_train.data.files import open_binary

from .protocol import Digest, RawRow, Shard, too_long

_BLOCK = 512
KIND_OF = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "heic", "avif"), "images"),
    **dict.fromkeys(("mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "mpg", "mpeg", "flv", "wmv"), "videos"),
    "pdf": "documents",
}
_NAMES = {"images": ("image", "images"), "videos": ("video", "videos"), "documents": ("document", "documents")}


class Member(NamedTuple):
    """A file in a tar file.

    offset: of its header. end: the first byte after it, a multiple of 512 bytes. key: what the members of a row have in common.
    """

    name: str
    offset: int
    offset_data: int
    size: int
    end: int
    key: str
    suffix: str

    @property
    def hidden(self) -> bool:
        return self.name.rpartition("/")[2].startswith(".")


def _member(name: str, offset: int, offset_data: int, size: int) -> Member:
    folder, slash, file = name.rpartition("/")
    stem, _, suffixes = file.partition(".")
    suffix = suffixes.rpartition(".")[2].lower() or "txt"
    return Member(name, offset, offset_data, size, offset_data + -(-size // _BLOCK) * _BLOCK, folder + slash + stem, suffix)


class TarRows:
    """Rows of a tar file, numbered from 1."""

    def __init__(self, path: str) -> None:
        self.path = path

    def scan(self, sizes: Iterator[int], fingerprint: Digest) -> Iterator[Shard]:
        """The digest covers text members, and of media the names and sizes."""
        wanted = next(sizes)
        start = end = count = 0
        digest = hashlib.blake2b(digest_size=20)
        with open_binary(self.path) as file:
            for members in self._groups(file, 0, None):
                if not count:
                    start, digest = members[0].offset, hashlib.blake2b(digest_size=20)
                for member in members:
                    content = b"" if member.suffix in KIND_OF else _content(file, member)
                    said = f"{member.name} {member.size}\n".encode("utf-8", "surrogateescape") + content
                    digest.update(said)
                    fingerprint.update(said)
                count, end = count + 1, members[-1].end
                if count == wanted:
                    yield Shard(start, end - start, count, digest.hexdigest())
                    count, wanted = 0, next(sizes)
        if count:
            yield Shard(start, end - start, count, digest.hexdigest())

    def read(self, shard: Shard, max_bytes: int) -> Iterator[RawRow]:
        with open_binary(self.path) as file:
            for members in self._groups(file, shard.start, shard.start + shard.size):
                start, end = members[0].offset, members[-1].end
                text = sum(member.size for member in members if member.suffix not in KIND_OF)
                content: dict[str, Any] | RowError
                try:
                    content = self._row(file, members) if text <= max_bytes else too_long(text, max_bytes)
                except RowError as error:
                    content = error
                yield RawRow(start, end - start, content)

    def get(self, start: int, size: int) -> dict[str, Any]:
        with open_binary(self.path) as file:
            groups = list(self._groups(file, start, start + size))
            if len(groups) != 1:
                raise RowError("bad-row", f"{self.path}: {len(groups)} rows are at byte {start}; the file changed, run eagle prepare again")
            return self._row(file, groups[0])

    def name(self, row: int, start: int) -> str:
        with open_binary(self.path) as file:
            first = next(self._groups(file, start, None), None)
        return f"{Path(self.path).name}/{first[0].key}" if first else f"{Path(self.path).name}, row {row}"

    def _groups(self, file: BinaryIO, start: int, end: int | None) -> Iterator[list[Member]]:
        """Members of each row between two bytes. Raises ConfigError for what is not a tar file."""
        pending: list[Member] = []
        try:
            for member in _members(file, start, end):
                if member.hidden:
                    continue
                if pending and pending[0].key != member.key:
                    yield pending
                    pending = []
                pending.append(member)
        except tarfile.ReadError as error:
            if "empty file" not in str(error):
                raise ConfigError(f"{self.path}: can't be read as a tar file: {error}") from error
        if pending:
            yield pending

    def _row(self, file: Any, members: Sequence[Member]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        media: dict[str, list[tuple[str, dict[str, Any]]]] = {kind: [] for kind in _NAMES}
        for member in members:
            suffix = member.suffix
            if (kind := KIND_OF.get(suffix)) is not None:
                name = os.path.basename(member.name)
                reference = {"tar": self.path, "member": member.name, "offset": member.offset_data, "size": member.size}
                media[kind].append((name, reference))
                continue
            content = _content(file, member)
            try:
                value = json.loads(content) if suffix == "json" else content.decode("utf-8")
            except ValueError as error:
                raise RowError("broken-json", f"{member.name}: {error}") from error
            if suffix != "json":
                row[suffix] = value
            elif isinstance(value, dict):
                row.update(value)
            else:
                raise RowError("broken-json", f"{member.name}: is a {type(value).__name__}, expected an object")
        row["__key__"] = members[0].key
        named = {name: reference for found in media.values() for name, reference in found}
        used: set[str] = set()
        row = _with_members(row, named, used)
        for kind, found in media.items():
            rest = [reference for name, reference in found if name not in used]
            if rest and any(row.get(key) for key in _NAMES[kind]):
                names = ", ".join(reference["member"] for reference in rest)
                raise RowError("bad-media", f"{names}: the row's JSON has {kind} of its own, and none of them is this member")
            if rest:
                row[kind] = rest
        return row


def _with_members(value: Any, named: dict[str, dict[str, Any]], used: set[str]) -> Any:
    """The value with every name of a member in the place of a path replaced by the member."""
    if isinstance(value, dict):
        return {
            key: item if key in ("value", "content", "text") and isinstance(item, str) else _with_members(item, named, used)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_members(item, named, used) for item in value]
    if isinstance(value, str) and (name := os.path.basename(value)) in named:
        used.add(name)
        return named[name]
    return value


def _members(file: BinaryIO, start: int, end: int | None) -> Iterator[Member]:
    """Files whose headers begin between two bytes. Raises tarfile.ReadError.

    Plain headers are read here, ten times as fast as tarfile reads them; from the first other one on (an extension, a folder, the end,
    damage) everything is left to tarfile."""
    place, size = start, file.seek(0, os.SEEK_END)
    while end is None or place < end:
        member = _plain(_read_at(file, place, _BLOCK), place)
        if member is None or member.end > size:
            break
        yield member
        place = member.end
    else:
        return
    file.seek(place)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (found := tar.next()) is not None and (end is None or found.offset < end):
            tar.members.clear()  # type: ignore[attr-defined]
            if found.isfile():
                yield _member(found.name, found.offset, found.offset_data, found.size)


def _read_at(file: BinaryIO, place: int, size: int) -> bytes:
    """Up to `size` bytes from `place` on. Of a local file exactly these: a buffer would be filled anew for every header."""
    if isinstance(getattr(file, "raw", None), io.FileIO):
        return os.pread(file.fileno(), size, place)
    file.seek(place)
    return file.read(size)


def _plain(block: bytes, offset: int) -> Member | None:
    """The file of a POSIX header (ustar) that needs nothing else to be understood, or None."""
    if len(block) < _BLOCK or block[156:157] != b"0" or block[257:265] != b"ustar\x0000":
        return None
    try:
        size, checksum = (int(block[first:stop].rstrip(b"\0 "), 8) for first, stop in ((124, 136), (148, 156)))
    except ValueError:
        return None
    # The sum of all bytes, with spaces in the place of the checksum itself, modulo 65521: a tenth of the time of `sum(block)`.
    if (zlib.adler32(block) & 0xFFFF) != (1 + checksum + sum(block[148:156]) - 8 * ord(" ")) % 65521:
        return None
    name, prefix = (block[first:stop].partition(b"\0")[0].decode("utf-8", "surrogateescape") for first, stop in ((0, 100), (345, 500)))
    return _member(f"{prefix}/{name}" if prefix else name, offset, offset + _BLOCK, size)


def _content(file: BinaryIO, member: Member) -> bytes:
    content = _read_at(file, member.offset_data, member.size)
    if len(content) != member.size:
        raise RowError("broken-record", f"{member.name}: the tar file ends in the middle of it")
    return content
