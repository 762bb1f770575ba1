"""Which keys of the rows are used, which are metadata, and which rows are refused; no medium is opened and nothing is tokenised."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from eagle_train.config import Config, Source

from .errors import RowError
from .facts import root_of
from .keys import ROW_KEYS, RowFormat, has_video, is_refused, says_nothing, short
from .recipe import recipe_of
from .sample import normalise
from .source_plan import row_format
from .sources import files_of, open_rows
from .sources.index import index_file

USED, METADATA, IGNORED, REFUSED, EMPTY = "used", "metadata", "ignored by the source", "refused", "empty"


class KeyUse(NamedTuple):
    """A key of rows in one role. rows: how many have it so. example: a value."""

    key: str
    use: str
    rows: int
    example: str


class Refusal(NamedTuple):
    """A reason for which rows are refused, with the first of them."""

    reason: str
    rows: int
    example: str


@dataclass(frozen=True)
class SourceLint:
    """What the rows of a source hold. rows: rows that were looked at, without empty lines."""

    name: str
    rows: int
    keys: tuple[KeyUse, ...]
    refusals: tuple[Refusal, ...]


def lint(config: Config, *, evaluation: bool = False, limit: int | None = None) -> list[SourceLint]:
    """Look at the rows of the run's sources (the held-out ones with `evaluation`), the first `limit` of each.

    Raises ConfigError for a recipe or a file that can't be read.
    """
    recipe = recipe_of(config, evaluation=evaluation)
    return [_lint_source(name, source, config, limit) for name, source in recipe.sources.items()]


def _lint_source(name: str, source: Source, config: Config, limit: int | None) -> SourceLint:
    form, root = row_format(source, config.facts_folder), root_of(source)
    uses: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    refusals: Counter[str] = Counter()
    first: dict[str, str] = {}
    rows = 0
    for line, content in itertools.islice(_rows_of(source, config), limit):
        rows += 1
        try:
            if isinstance(content, RowError):
                raise content
            video = has_video(content, form)
            for key, value in content.items():
                use = use_of(key, value, form, with_video=video)
                uses[key, use] += 1
                examples.setdefault((key, use), short(value))
            normalise(content, name, root=root, line=line, form=form)
        except RowError as error:
            refusals[error.reason] += 1
            first.setdefault(error.reason, f"{name}:{line}: {error.detail}")
    keys = tuple(KeyUse(key, use, count, examples[key, use]) for (key, use), count in sorted(uses.items()))
    return SourceLint(name, rows, keys, tuple(Refusal(reason, count, first[reason]) for reason, count in refusals.most_common()))


def _rows_of(source: Source, config: Config) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """(line, content) of every row that isn't an empty line."""
    line = 0
    for path in files_of(source, config.facts_folder / "unpacked"):
        file = open_rows(path)
        for shard in index_file(path, config.data.shard_rows, config.facts_folder / "index").shards:
            for row in file.read(shard, config.data.limits.max_line_bytes):
                line += 1
                if row.content is not None:
                    yield line, row.content


def use_of(key: str, value: Any, form: RowFormat, *, with_video: bool = False) -> str:
    """What becomes of a key of a row, of one with a video or without: `used`, `metadata`, `ignored by the source`, `refused` or `empty`."""
    if key in form.ignore:
        return IGNORED
    if isinstance(value, Mapping | list | str | bytes | None) and says_nothing(value):
        return EMPTY
    if key in ROW_KEYS or key in {column for _, column in form.columns}:
        return USED
    return REFUSED if is_refused(key, value, with_video=with_video) else METADATA
