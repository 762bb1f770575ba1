"""Prepare: every row is measured once, on all CPUs, into Parquet; what can't be used goes to a ledger.

Where facts are, and what their key covers: `source_plan`. A process that measures holds a lock on the source's folder; another one is
refused.

The key doesn't cover the media: opening each of them would be measuring. Rows that were left out for their media are looked at again
when an incomplete source is continued (one that the limits stopped, say), and in a complete one, which may be in training, only when
that is asked for. Rows that became good change the key of the facts, and not the folder.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eagle_model.prompt.costs import FrameCosts, PromptCosts
from eagle_train.config import Config
from eagle_train.executors import Executor, WorkerError, cpus, map_items

from .errors import PrepareError
from .facts import Facts
from .join import join_sources
from .ledger import Ledger
from .lock import locked
from .parts import Counts, Measuring, Work
from .recipe import Recipe, recipe_of
from .source_plan import SourcePlan, ledger_entries, source_plans
from .tally import Progress, Tally
from .users import record_user

POOL_PAYS_AFTER = 5.0
"""Seconds that processes must save, or of work before they are started in any case: starting them costs 2 to 5 s."""
WORK_FOR_EACH = 2.0
"""Seconds of work for which a process is started: all cores are busy while many start."""
_ARRIVES_WITHIN = 60.0
"""Seconds that a network file system may take to show what another machine wrote."""
_ADVICE = "with data.workers=1 and a small data.shard_rows the row is found"


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
    plans = source_plans(config, recipe, tokenizer)
    state = Tally(config, plans, progress)
    where = "prepare eval" if evaluation else "prepare"
    record_user(config)
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
            Ledger(config.run.folder / "ledger.jsonl").replace(ledger_entries(plans, where), where=where)
        _check_counts(state, plans)
        costs = PromptCosts(tokenizer).frame_costs
        for plan in plans:
            plan.finish(costs)
    good, bad, blank = (sum(getattr(plan.counts, name) for plan in plans) for name in Counts._fields)
    reasons: dict[str, int] = {}
    for entry in ledger_entries(plans, where):
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
    plans = source_plans(config, recipe, tokenizer)
    missing = [plan.name for plan in plans if plan.done() is None]
    if missing:
        raise PrepareError(
            f"no facts under {config.facts_folder} for {', '.join(missing)} as configured now (annotation, root, tokenizer and limits "
            "count); run `eagle prepare` first"
        )
    return _assemble(config, plans)


def _run(state: Tally, todo: list[tuple[SourcePlan, Work]], config: Config, tokenizer: Any, executor: str) -> None:
    """All shards, in this process or in several; without data.workers, processes are started when the work turns out to be long."""
    workers = config.data.workers
    measuring = Measuring(tokenizer, config.data)
    plans = {plan.name: plan for plan, _ in todo}
    works = [work for _, work in todo]
    if executor == "local" and workers is None and works:
        begin, rows, took, left = time.monotonic(), 0, 0.0, 0.0
        while works and (len(works) == 1 or max(took, left * (1 - 1 / cpus())) <= POOL_PAYS_AFTER):
            work = works.pop(0)
            state.finished(plans[work.source], measuring(work))
            rows += work.shard.rows
            took = time.monotonic() - begin
            left = took / max(1, rows) * sum(work.shard.rows for work in works)  # at the rate of the rows so far
        workers = min(cpus(), max(2, math.ceil(left / WORK_FOR_EACH)))
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


def _check_counts(state: Tally, plans: Sequence[SourcePlan]) -> None:
    good, bad, blank = (sum(getattr(plan.counts, name) for plan in plans) for name in Counts._fields)
    if good + bad + blank != state.total:
        raise RuntimeError(
            f"{good} good + {bad} bad rows + {blank} empty lines are not the {state.total} lines that were read; please report this"
        )


def _busy(folder: Path, holder: str) -> PrepareError:
    return PrepareError(f"{folder} is being prepared by {holder}: wait for it, and run again; what is complete then is not measured again")


def _assemble(config: Config, plans: list[SourcePlan]) -> Facts:
    done = [plan.done() or {} for plan in plans]
    content = [(plan.key, one["unused"]) for plan, one in zip(plans, done)]
    key = hashlib.blake2b(repr(content).encode(), digest_size=10).hexdigest()
    costs = FrameCosts(tuple(tuple(row) for row in done[-1]["frame_costs"])) if done else None
    return join_sources(config, [plan.prepared(one) for plan, one in zip(plans, done)], costs, key)


def _length_notes(recipe: Recipe, plans: list[SourcePlan]) -> Iterator[str]:
    for plan in plans:
        claimed = recipe.lengths.get(plan.name)
        rows = plan.counts.good + plan.counts.bad
        if claimed is not None and claimed != rows:
            yield f"source {plan.name}: the recipe says length {claimed}, the annotation file has {rows} rows"
