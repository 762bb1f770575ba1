"""Verbs that look: doctor and report."""

from __future__ import annotations

import typer

from .app import app
from .options import RunFolder


@app.command()
def doctor() -> None:
    """Say what this machine and installation can do, and what to do about problems."""
    from .doctor import examine

    report = examine()
    width = max(len(finding.name) for finding in report)
    for finding in report:
        print(f"{finding.name:<{width}}  {finding.value}")
    problems = [finding for finding in report if finding.cure]
    for finding in problems:
        print(f"problem: {finding.name}: {finding.value}; {finding.cure}")
    if any(finding.serious for finding in problems):
        raise typer.Exit(1)
    print("no problem found" if not problems else f"{len(problems)} problems, none that stops training")


@app.command()
def report(run: RunFolder) -> None:
    """Draw the plot of a run and sum it up."""
    from eagle_train.runs.folder import open_run
    from eagle_train.watching.report import summary, write_report

    folder = open_run(run).run.folder
    path = write_report(folder)
    print(summary(folder))
    print(f"plot: {path}")
