"""What there is to measure of one source: its folder and key, its shards, their ledgers, and what says that it is complete.

Layout: `<facts>/<source>-<key>/part-<digest>.parquet` with `part-<digest>.ledger.jsonl` next to it, and `done-<content>.json` when the
source is complete. The key covers what facts depend on next to the rows (source, media root, columns, tokenizer, prompt, limits), the
digest what the rows of the part say: rows that are appended are measured, the others are found again. Parts are written under another
name and renamed, the ledger first, so after a kill (also -9) a part exists whole or not at all, and the next run continues with what is
missing.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eagle_model.prompt import VideoSpan, encode, render, to_text
from eagle_model.prompt.costs import FrameCosts
from eagle_train.config import Config, Source
from eagle_train.executors import in_threads

from .atomic import read_json, replacing
from .errors import PrepareError
from .facts import FACTS_VERSION, RowFile, root_of
from .join import Part, Prepared
from .ledger import Entry, read_entries
from .parts import Counts, Work, content_of_part, ledger_of
from .recipe import Recipe
from .sample import RowFormat
from .sources import files_of
from .sources.index import FileIndex, index_file
from .sources.protocol import Shard


class SourcePlan:
    """One source: its key, its folder, its shards, and the counts so far."""

    def __init__(self, config: Config, name: str, source: Source, fingerprint: str) -> None:
        self.name = name
        self.source = source
        data = config.data
        self.files: list[FileIndex] = [
            index_file(path, data.shard_rows, config.facts_folder / "index") for path in files_of(source, config.facts_folder / "unpacked")
        ]
        self.form = row_format(source, config.facts_folder)
        self.fingerprint = fingerprint_of(self.files)
        self.lines = sum(file.rows for file in self.files)
        limits = {field: getattr(data.limits, field) for field in ("max_pixels", "max_bytes", "max_frames", "max_line_bytes")}
        content = {
            "version": FACTS_VERSION,
            "source": name,
            "columns": [sorted(source.columns.items()), sorted(source.ignore), source.question],
            "root": str(root.resolve() if isinstance(root := root_of(source), Path) else root),
            "tokenizer": fingerprint,
            "system": config.prompt.system,
            "verify": data.verify,
            "limits": limits,
        }
        if data.verify == "decode" and source.on_damage != "refuse":  # otherwise no frame is decoded, and the facts are the same
            content["on_damage"] = source.on_damage
        rules = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=10).hexdigest()
        self.folder = config.facts_folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{rules}"
        self.key = hashlib.blake2b(f"{rules} {self.fingerprint}".encode(), digest_size=10).hexdigest()
        self.counts = Counts(0, 0, 0)
        self.system = config.prompt.system
        self.max_line_bytes = data.limits.max_line_bytes

    def part(self, shard: Shard) -> Path:
        return self.folder / f"part-{shard.digest}.parquet"

    def shards(self) -> Iterator[tuple[FileIndex, Shard, int]]:
        """Every shard with its file, and the line of the source (1-based) that it starts with."""
        line = 1
        for file in self.files:
            for shard in file.shards:
                yield file, shard, line
                line += shard.rows

    def works(self) -> Iterator[Work]:
        for file, shard, line in self.shards():
            yield Work(
                self.name, file.path, root_of(self.source), shard, line, self.part(shard), self.system, self.form, self.max_line_bytes
            )

    @property
    def done_file(self) -> Path:
        return self.folder / f"done-{self.key}.json"

    def done(self) -> dict[str, Any] | None:
        """What an earlier run wrote that completed the source."""
        return read_json(self.done_file)

    def is_open(self, again: bool) -> bool:
        """Whether there may be something to do; `again`: also in a complete source that has bad rows."""
        done = self.done()
        return done is None or bool(again and done["bad_rows"])

    def begin(self, again: bool) -> None:
        """Remove what killed processes left, and what says that the source is complete; the folder is locked."""
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        if self.is_open(again):
            self.done_file.unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        """The ledger of all shards, with the lines of the source."""
        for file, shard, first in self.shards():
            path = ledger_of(self.part(shard))
            if path.exists():
                for entry in read_entries(path):
                    yield replace(entry, line=entry.line + first, file=file.path if len(self.files) > 1 else "")

    def finish(self, costs: FrameCosts) -> None:
        """Write what makes the source complete; PrepareError when an annotation file changed meanwhile."""
        for file in self.files:
            if file.changed():
                raise PrepareError(f"{file.path}: changed while it was being read; run prepare again")
        if self.done() is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "source": self.name,
            "key": self.key,
            "rows": self.counts.good,
            "bad_rows": self.counts.bad,
            "blank_lines": self.counts.blank,
            # The lines that the facts don't have, which a repair changes.
            "unused": hashlib.blake2b(repr([entry.line for entry in self.entries()]).encode(), digest_size=10).hexdigest(),
            "content": self._content([self.part(shard).name for _, shard, _ in self.shards()]),
            "parts": [[self.part(shard).name, line, shard.start] for _, shard, line in self.shards()],
            "frame_costs": costs.table,
        }
        with replacing(self.done_file) as file:
            file.write(json.dumps(content).encode())

    def prepared(self, done: dict[str, Any]) -> Prepared:
        """The complete source, as the facts are made of it."""
        lines = itertools.accumulate((file.rows for file in self.files), initial=1)
        files = tuple(RowFile(file.path, line) for file, line in zip(self.files, lines))
        parts = [Part(self.folder / name, line, start) for name, line, start in done["parts"]]
        content = done.get("content") or self._content([part.path.name for part in parts])
        return Prepared(self.name, self.source, files, self.form, self.fingerprint, done["rows"], done["bad_rows"], content, parts)

    def _content(self, names: Sequence[str]) -> str:
        """A hash of the facts in parts, in this order."""
        hashes = in_threads(content_of_part, [self.folder / name for name in names])
        return hashlib.blake2b(" ".join(hashes).encode(), digest_size=16).hexdigest()


def source_plans(config: Config, recipe: Recipe, tokenizer: Any) -> list[SourcePlan]:
    fingerprint = tokenizer_fingerprint(tokenizer)
    return [SourcePlan(config, name, source, fingerprint) for name, source in recipe.sources.items()]


def row_format(source: Source, facts_folder: Path) -> RowFormat:
    """How the rows of a source are written."""
    columns, ignore = tuple(source.columns.items()), tuple(source.ignore)
    return RowFormat(columns, ignore, source.question, str(facts_folder / "media"), source.on_damage)


def fingerprint_of(files: Sequence[FileIndex]) -> str:
    """A hash of all that the rows of a source say: of one file its own, of several one of theirs in order."""
    if len(files) == 1:
        return files[0].fingerprint
    return hashlib.blake2b("\n".join(file.fingerprint for file in files).encode(), digest_size=20).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what the tokenizer and the prompt make of text: its whole definition, and a conversation with every kind of medium."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))).encode())
    messages = [
        {"role": "user", "content": "<image-1><video-1> Hällo <video-2> 123?\n\n  <|im_end|>"},
        {"role": "observation", "content": "<img>"},
        {"role": "assistant", "content": "An answer, 4.5."},
    ]
    videos = [VideoSpan([0.0, 12.25], 1.5, 2), VideoSpan(None, None, 1, 2)]
    segments = render(messages, images=[3], videos=videos)
    encoded = encode(segments, tokenizer)
    for content in (to_text(segments).encode(), encoded.input_ids.tobytes(), encoded.labels.tobytes()):
        digest.update(content)
    return digest.hexdigest()


def ledger_entries(plans: list[SourcePlan], where: str) -> Iterator[Entry]:
    for plan in plans:
        for entry in plan.entries():
            yield replace(entry, where=where)
