"""A JSON array of objects, as LLaVA's annotations are. An address is the range of bytes of an element.

The file is read in pieces; neither it nor its rows are held in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle_train.config import ConfigError
from eagle_train.data.files import open_binary

from .jsonl import parse_row, parsed
from .protocol import Digest, RawRow, Shard, too_long

_CHUNK = 1 << 22
_LONGEST = 1 << 28
"""Bytes after which an element that doesn't end is called broken."""


class JsonArray:
    """The elements of an array, numbered from 1."""

    def __init__(self, path: str) -> None:
        self.path = path

    def scan(self, sizes: Iterator[int], fingerprint: Digest) -> Iterator[Shard]:
        wanted = next(sizes)
        with open_binary(self.path, buffering=0) as file:
            start = end = count = 0
            digest = hashlib.blake2b(digest_size=20)
            for begin, end, content in self._elements(file, 0):
                if not count:
                    start, digest = begin, hashlib.blake2b(digest_size=20)
                for update in (digest.update, fingerprint.update):
                    update(content)
                    update(b"\n")
                count += 1
                if count == wanted:
                    yield Shard(start, end - start, count, digest.hexdigest())
                    count, wanted = 0, next(sizes)
            if count:
                yield Shard(start, end - start, count, digest.hexdigest())

    def read(self, shard: Shard, max_bytes: int) -> Iterator[RawRow]:
        with open_binary(self.path, buffering=0) as file:
            for number, (begin, end, content) in enumerate(self._elements(file, shard.start)):
                if number == shard.rows:
                    return
                size = end - begin
                yield RawRow(begin, size, parsed(content) if size <= max_bytes else too_long(size, max_bytes))

    def get(self, start: int, size: int) -> dict[str, Any]:
        with open_binary(self.path) as file:
            file.seek(start)
            return parse_row(file.read(size))

    def name(self, row: int, start: int) -> str:
        return f"{Path(self.path).name}[{row - 1}]"

    def _elements(self, file: Any, start: int) -> Iterator[tuple[int, int, bytes]]:
        """(first byte, byte after the last, content) of every element from byte `start` on: 0, or where an element begins."""
        file.seek(start)
        decoder = json.JSONDecoder()
        # Bytes that aren't UTF-8 survive as lone surrogates; the row that has them is refused when it is parsed.
        text, place, opened, eof = "", 0, start > 0, False
        offset = start  # of text[place], in bytes
        wanted = _CHUNK

        def more() -> None:
            nonlocal text, place, eof
            data = file.read(wanted)
            eof = not data
            # A character may be cut by the end of the piece: put its bytes together before decoding.
            rest = text[place:].encode("utf-8", "surrogateescape") + data
            text, place = rest.decode("utf-8", "surrogateescape"), 0

        def skip(characters: str) -> None:
            nonlocal place, offset
            while True:
                while place < len(text) and text[place] in characters:
                    place, offset = place + 1, offset + (3 if text[place] == "\ufeff" else 1)
                if place < len(text) or eof:
                    return
                more()

        if not opened:
            skip("\ufeff \t\r\n")
            if text[place : place + 1] != "[":
                raise ConfigError(f"{self.path}: is not a JSON array")
            place, offset = place + 1, offset + 1
        while True:
            skip(" \t\r\n,")
            if place >= len(text):
                raise ConfigError(f"{self.path}: the JSON array has no end; the file is cut off at byte {offset}")
            if text[place] == "]":
                return
            try:
                _, stop = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                if not eof and len(text) - place < _LONGEST:
                    wanted = max(_CHUNK, 2 * (len(text) - place))
                    more()
                    continue
                raise ConfigError(f"{self.path}: not valid JSON in the element that starts at byte {offset}: {error}") from error
            if stop == len(text) and not eof:  # a number may go on
                more()
                continue
            wanted = _CHUNK
            content = text[place:stop].encode("utf-8", "surrogateescape")
            yield offset, offset + len(content), content
            place, offset = stop, offset + len(content)
