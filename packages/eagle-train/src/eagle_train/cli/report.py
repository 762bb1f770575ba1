"""`eagle report`: the plot and the summary of a run."""

from __future__ import annotations

from .app import app
from .options import RunFolder


@app.command()
def report(run: RunFolder) -> None:
    """Draw the plot of a run and summarize it."""
    from eagle_train.runs.folder import open_run
    from eagle_train.watching.report import summary, write_report

    folder = open_run(run).run.folder
    path = write_report(folder)
    print(summary(folder))
    print(f"plot: {path}")
