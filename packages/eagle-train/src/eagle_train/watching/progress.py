"""Progress of `prepare` as a bar with rows a second, bad rows and time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eagle_train.data.prepare import Progress as Step


@contextmanager
def prepare_progress(console: Console | None = None) -> Iterator[Callable[[Step], None]]:
    """A bar on `console` (default: standard error); pass what it yields to `prepare(progress=...)`."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bad]} bad"),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task("prepare", total=None, bad=0)

        def show(step: Step) -> None:
            bar.update(task, description=f"prepare {step.source}", completed=step.rows_done, total=step.rows_total, bad=step.bad_rows)

        yield show


@contextmanager
def counting(what: str, unit: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar that counts `unit` (done, total), on `console` (default: standard error)."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console or Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
