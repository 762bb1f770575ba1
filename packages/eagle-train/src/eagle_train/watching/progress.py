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
