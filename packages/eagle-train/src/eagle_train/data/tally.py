"""Rows that are measured and rows that can't be used, over all sources: progress, and when the limits stop a preparation."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from eagle_train.config import Config

from .errors import PrepareError
from .ledger import top_reasons
from .parts import Counts, Work, counts_of, has_media_reasons
from .source_plan import SourcePlan, ledger_entries

ALWAYS_ALLOWED = 10
"""Bad rows per source that never stop a run (unless the limit is 0): a share means nothing for a handful of rows."""
_CHECK_AFTER = 1000
"""Rows of a source before its share of bad ones stops a run on the way."""


class Progress(NamedTuple):
    """Where preparation stands; `rows_done` of `rows_total` lines, of which `rows_reused` were found from an earlier run."""

    source: str
    rows_done: int
    rows_total: int
    rows_reused: int
    bad_rows: int


class Tally:
    """Counts over all sources, progress, and the limits."""

    def __init__(self, config: Config, plans: list[SourcePlan], progress: Callable[[Progress], None] | None) -> None:
        self.limits = config.data.limits
        self.ledger = config.run.folder / "ledger.jsonl"
        self.plans = plans
        self.progress = progress
        self.total = sum(plan.lines for plan in plans)
        self.done = self.reused = 0

    def look(self) -> list[tuple[SourcePlan, Work]]:
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

    def finished(self, plan: SourcePlan, counts: Counts) -> None:
        plan.counts = Counts(*(a + b for a, b in zip(plan.counts, counts)))
        self.done += sum(counts)
        if self.progress is not None:
            bad = sum(plan.counts.bad for plan in self.plans)
            self.progress(Progress(plan.name, self.done, self.total, self.reused, bad))
        self.check_limits(final=False, plans=[plan])

    def check_limits(self, *, final: bool, plans: Iterable[SourcePlan] | None = None) -> None:
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
            # A download that failed is a file of one bad row, or of none: without this the run would train without the source.
            if final and not good and fraction < 1:
                if not bad:
                    files = ", ".join(str(file.path) for file in plan.files[:3])
                    raise PrepareError(f"source {plan.name}: {files}: no rows; repair the annotation, or remove the source")
                self._stop(f"source {plan.name}: {'its row' if bad == 1 else f'all of its {bad} rows'} can't be used", [plan])

    def _stop(self, message: str, plans: list[SourcePlan]) -> None:
        lines = "".join(f"\n  {line}" for line in top_reasons(ledger_entries(plans, "prepare")))
        advice = "Repair the rows or their media and run again, or raise the limit"
        raise PrepareError(f"{message}; most frequent reasons:{lines}\nAll of them: {self.ledger}. {advice}.")
