"""Prepare: every row is measured once, on all CPUs, into Parquet; what can't be used goes to a ledger.

Layout: `<facts>/<source>-<key>/part-<digest>.parquet` with `part-<digest>.ledger.jsonl` next to it, and `done-<content>.json` when the
source is complete. The key covers what facts depend on next to the rows (source, media root, columns, tokenizer, prompt, limits), the
digest what the rows of the part say: rows that are appended are measured, the others are found again. Parts are written under another
name and renamed, the ledger first, so after a kill (also -9) a part exists whole or not at all, and the next run continues with what is
missing. A process that measures holds a lock on the source's folder; another one is refused.

The key doesn't cover the media: opening each of them would be measuring. Rows that were left out for their media are looked at again
when an incomplete source is continued (one that the limits stopped, say), and in a complete one, which may be in training, only when
that is asked for. Rows that became good change the key of the facts, and not the folder.
"""

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from eagle_model.prompt import VideoSpan, encode, render, to_text
from eagle_model.prompt.costs import FrameCosts, PromptCosts
from eagle_train.config import Config, Source
from eagle_train.errors import BAD_DATA, TrainError
from eagle_train.executors import Executor, WorkerError, in_threads, map_items

from .atomic import read_json, replacing
from .facts import FACTS_VERSION, Facts, RowFile, root_of
from .join import Part, Prepared, join_sources
from .ledger import Entry, Ledger, read_entries, top_reasons
from .lock import locked
from .parts import Counts, Measuring, Work, content_of_part, counts_of, has_media_reasons, ledger_of
from .recipe import Recipe, recipe_of
from .sample import RowFormat
from .sources import files_of
from .sources.index import FileIndex, index_file
from .sources.protocol import Shard

ALWAYS_ALLOWED = 10
"""Bad rows per source that never stop a run (unless the limit is 0): a share means nothing for a handful of rows."""
POOL_PAYS_AFTER = 5.0
"""Seconds of work before processes are started: starting one costs 2-5 s, in which this process measures 15-40 thousand rows."""
_CHECK_AFTER = 1000
_ARRIVES_WITHIN = 60.0
"""Seconds that a network file system may take to show what another machine wrote."""
_ADVICE = "with data.workers=1 and a small data.shard_rows the row is found"


class PrepareError(TrainError, ValueError):
    """Preparation stopped: too many bad rows, sources that can't be read, or facts that don't exist yet."""

    exit_code = BAD_DATA


class Progress(NamedTuple):
    """Where preparation stands; `rows_done` of `rows_total` lines, of which `rows_reused` were found from an earlier run."""

    source: str
    rows_done: int
    rows_total: int
    rows_reused: int
    bad_rows: int


@dataclass(frozen=True)
class PrepareReport:
    """The end of a preparation: `rows` = `good_rows` + `bad_rows`; empty lines are not rows."""

    facts: Facts
    rows: int
    good_rows: int
    bad_rows: int
    blank_lines: int
    rows_reused: int
    reasons: dict[str, int]
    notes: tuple[str, ...]
    seconds: float


def prepare(
    config: Config,
    tokenizer: Any,
    *,
    evaluation: bool = False,
    again: bool = False,
    executor: Executor = "local",
    progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Measure every row of the run's sources (the held-out ones with `evaluation`), or find it measured.

    Args:
        tokenizer: a transformers tokenizer that knows Eagle's tokens; must be picklable when data.workers > 1.
        again: look again at the rows of complete sources that were left out for their media, which may have been repaired since.
        executor: "local": data.workers processes of this machine; "ray": tasks on a Ray cluster, see `executors.map_items`.
        progress: called in this process whenever a shard is done.

    Raises:
        PrepareError: more bad rows than data.limits allow, with the most frequent reasons; a process died; or another process prepares
            one of the sources.
        ConfigError: the recipe.
    """
    started = time.monotonic()
    recipe = recipe_of(config, evaluation=evaluation)
    plans = _source_plans(config, recipe, tokenizer)
    state = _State(config, plans, progress)
    where = "prepare eval" if evaluation else "prepare"
    # Locked from before looking until the sources are complete: what another process is writing is neither measured twice nor removed.
    with ExitStack() as held:
        for plan in plans:
            if plan.is_open(again):
                held.enter_context(locked(plan.folder, partial(_busy, plan.folder)))
                plan.begin(again)
        try:
            _run(state, state.look(), config, tokenizer, executor)
            state.check_limits(final=True)
        finally:
            Ledger(config.run.folder / "ledger.jsonl").replace(_entries(plans, where), where=where)
        _check_counts(state, plans)
        costs = PromptCosts(tokenizer).frame_costs
        for plan in plans:
            plan.finish(costs)
    good, bad, blank = (sum(getattr(plan.counts, name) for plan in plans) for name in Counts._fields)
    reasons: dict[str, int] = {}
    for entry in _entries(plans, where):
        reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
    return PrepareReport(
        _assemble(config, plans),
        good + bad,
        good,
        bad,
        blank,
        state.reused,
        reasons,
        (*recipe.notes, *_length_notes(recipe, plans)),
        time.monotonic() - started,
    )


def load_facts(config: Config, tokenizer: Any, *, evaluation: bool = False) -> Facts:
    """Facts that `prepare` made for exactly this configuration and tokenizer; raises PrepareError when there are none."""
    recipe = recipe_of(config, evaluation=evaluation)
    plans = _source_plans(config, recipe, tokenizer)
    missing = [plan.name for plan in plans if plan.done() is None]
    if missing:
        raise PrepareError(
            f"no facts under {config.facts_folder} for {', '.join(missing)} as configured now (annotation, root, tokenizer and limits "
            "count); run `eagle prepare` first"
        )
    return _assemble(config, plans)


def _check_counts(state: "_State", plans: Sequence["_SourcePlan"]) -> None:
    good, bad, blank = (sum(getattr(plan.counts, name) for plan in plans) for name in Counts._fields)
    if good + bad + blank != state.total:
        raise RuntimeError(
            f"{good} good + {bad} bad rows + {blank} empty lines are not the {state.total} lines that were read; please report this"
        )


def _busy(folder: Path, holder: str) -> PrepareError:
    return PrepareError(f"{folder} is being prepared by {holder}: wait for it, and run again; what is complete then is not measured again")


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


def _source_plans(config: Config, recipe: Recipe, tokenizer: Any) -> list["_SourcePlan"]:
    fingerprint = tokenizer_fingerprint(tokenizer)
    return [_SourcePlan(config, name, source, fingerprint) for name, source in recipe.sources.items()]


class _SourcePlan:
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


def row_format(source: Source, facts_folder: Path) -> RowFormat:
    """How the rows of a source are written."""
    columns, ignore = tuple(source.columns.items()), tuple(source.ignore)
    return RowFormat(columns, ignore, source.question, str(facts_folder / "media"), source.on_damage)


def fingerprint_of(files: Sequence[FileIndex]) -> str:
    """A hash of all that the rows of a source say: of one file its own, of several one of theirs in order."""
    if len(files) == 1:
        return files[0].fingerprint
    return hashlib.blake2b("\n".join(file.fingerprint for file in files).encode(), digest_size=20).hexdigest()


class _State:
    """Counts over all sources, progress, and the limits."""

    def __init__(self, config: Config, plans: list[_SourcePlan], progress: Callable[[Progress], None] | None) -> None:
        self.limits = config.data.limits
        self.ledger = config.run.folder / "ledger.jsonl"
        self.plans = plans
        self.progress = progress
        self.total = sum(plan.lines for plan in plans)
        self.done = self.reused = 0

    def look(self) -> list[tuple[_SourcePlan, Work]]:
        """Shards that are still to do, or to be looked at again; those that are there are counted."""
        todo = []
        for plan in self.plans:
            if (done := plan.done()) is not None:
                counts = Counts(done["rows"], done["bad_rows"], done["blank_lines"])
                self.reused += sum(counts)
                self.finished(plan, counts)
                continue
            seen: set[Path] = set()
            for work in plan.works():
                counts = counts_of(work.part)
                if counts is None or work.part in seen:  # of two shards with the same rows one makes the part, and the other finds it
                    todo.append((plan, work))
                    seen.add(work.part)
                elif counts.bad and has_media_reasons(work.part):
                    todo.append((plan, work._replace(again=True)))
                else:
                    self.reused += sum(counts)
                    self.finished(plan, counts)
        return todo

    def finished(self, plan: _SourcePlan, counts: Counts) -> None:
        plan.counts = Counts(*(a + b for a, b in zip(plan.counts, counts)))
        self.done += sum(counts)
        if self.progress is not None:
            bad = sum(plan.counts.bad for plan in self.plans)
            self.progress(Progress(plan.name, self.done, self.total, self.reused, bad))
        self.check_limits(final=False, plans=[plan])

    def check_limits(self, *, final: bool, plans: Iterable[_SourcePlan] | None = None) -> None:
        total_bad = sum(plan.counts.bad for plan in self.plans)
        if self.limits.max_bad_rows is not None and total_bad > self.limits.max_bad_rows:
            self._stop(f"{total_bad} rows can't be used, data.limits.max_bad_rows allows {self.limits.max_bad_rows}", self.plans)
        for plan in self.plans if plans is None else plans:
            good, bad, _ = plan.counts
            fraction = self.limits.max_bad_fraction
            seen = good + bad
            # On the way twice the share stops: bad rows may come first, but what is mostly bad needn't be read through.
            allowed = 0 if fraction == 0 else max(fraction * seen * (1 if final else 2), ALWAYS_ALLOWED)
            if bad > allowed and (final or seen >= _CHECK_AFTER or fraction == 0):
                self._stop(
                    f"source {plan.name}: {bad} of {seen} rows can't be used, data.limits.max_bad_fraction allows {fraction:.2%}",
                    [plan],
                )

    def _stop(self, message: str, plans: list[_SourcePlan]) -> None:
        lines = "".join(f"\n  {line}" for line in top_reasons(_entries(plans, "prepare")))
        advice = "Repair the rows or their media and run again, or raise the limit"
        raise PrepareError(f"{message}; most frequent reasons:{lines}\nAll of them: {self.ledger}. {advice}.")


def _run(state: "_State", todo: list[tuple["_SourcePlan", Work]], config: Config, tokenizer: Any, executor: str) -> None:
    """All shards, in this process or in several; without data.workers, processes are started when the work turns out to be long."""
    workers = config.data.workers
    measuring = Measuring(tokenizer, config.data)
    plans = {plan.name: plan for plan, _ in todo}
    works = [work for _, work in todo]
    if executor == "local" and workers is None and works:
        deadline = time.monotonic() + POOL_PAYS_AFTER
        while works and (len(works) == 1 or time.monotonic() < deadline):
            work = works.pop(0)
            state.finished(plans[work.source], measuring(work))
    options = {"workers": workers, "executor": executor, "name": lambda work: f"{work.source}:{work.first_line}", "advice": _ADVICE}
    try:
        for work, counts in map_items(measuring, works, **options):
            if executor == "ray":
                _check_arrived(work.part)
            state.finished(plans[work.source], counts)
    except WorkerError as error:
        raise PrepareError(str(error)) from error


def _check_arrived(part: Path) -> None:
    """Raises PrepareError when a part that another machine wrote can't be seen here: its disk is not this one's."""
    deadline = time.monotonic() + _ARRIVES_WITHIN
    while part.name not in os.listdir(part.parent):  # listing refreshes what a network file system remembers
        if time.monotonic() > deadline:
            raise PrepareError(
                f"{part}: a node of the cluster wrote it, and it is not here; with --executor ray the rows, the media and the facts "
                "(data.facts) must be on a file system that all nodes share, under the same paths"
            )
        time.sleep(0.2)


def _entries(plans: list[_SourcePlan], where: str) -> Iterator[Entry]:
    for plan in plans:
        for entry in plan.entries():
            yield replace(entry, where=where)


def _assemble(config: Config, plans: list[_SourcePlan]) -> Facts:
    done = [plan.done() or {} for plan in plans]
    content = [(plan.key, one["unused"]) for plan, one in zip(plans, done)]
    key = hashlib.blake2b(repr(content).encode(), digest_size=10).hexdigest()
    costs = FrameCosts(tuple(tuple(row) for row in done[-1]["frame_costs"])) if done else None
    return join_sources(config, [plan.prepared(one) for plan, one in zip(plans, done)], costs, key)


def _length_notes(recipe: Recipe, plans: list[_SourcePlan]) -> Iterator[str]:
    for plan in plans:
        claimed = recipe.lengths.get(plan.name)
        rows = plan.counts.good + plan.counts.bad
        if claimed is not None and claimed != rows:
            yield f"source {plan.name}: the recipe says length {claimed}, the annotation file has {rows} rows"
