"""The verbs of `eagle curate`: split, embed, select, annotate, check, run, show."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app
from .documents import writing
from .options import Executor, Overrides, with_executor

if TYPE_CHECKING:
    from eagle_train.curate.endpoint import Account
    from eagle_train.curate.settings import CurateConfig

curate_app = typer.Typer(help="From videos to a recipe; docs/curate.md describes it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(curate_app, name="curate")

CurateFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Curation (YAML); docs/curate.md has one.", show_default=False)]


@curate_app.command()
def split(config: CurateFile, overrides: Overrides = None, executor: Executor = None) -> None:
    """Split videos into clips: shots, fixed lengths or chapters."""
    _split(_load(config, overrides, executor))


@curate_app.command()
def embed(config: CurateFile, overrides: Overrides = None, executor: Executor = None) -> None:
    """Compute one vector per clip with a vision encoder."""
    _embed(_load(config, overrides, executor))


@curate_app.command()
def select(config: CurateFile, overrides: Overrides = None) -> None:
    """Select novel clips without near-duplicates, up to some hours."""
    _select(_load(config, overrides))


@curate_app.command()
def annotate(
    config: CurateFile,
    overrides: Overrides = None,
    executor: Executor = None,
    batch_out: Annotated[
        Path | None, typer.Option(help="Write requests to this OpenAI batch file instead of sending them.", show_default=False)
    ] = None,
    batch_in: Annotated[Path | None, typer.Option(help="Results of a batch, which are read first.", show_default=False)] = None,
) -> None:
    """Let a model write question-answer pairs.

    It is requested through an OpenAI-compatible endpoint.
    """
    _annotate(_load(config, overrides, executor), batch_out, batch_in)


@curate_app.command()
def check(config: CurateFile, overrides: Overrides = None) -> None:
    """Remove pairs that need no frames, leak or repeat.

    Also those of a bad length. Then the recipe is written.
    """
    _check(_load(config, overrides))


@curate_app.command()
def run(config: CurateFile, overrides: Overrides = None, executor: Executor = None) -> None:
    """Do all steps in order; what is done already is found again."""
    loaded = _load(config, overrides, executor)
    _split(loaded)
    _embed(loaded)
    _select(loaded)
    _annotate(loaded, None, None)
    _check(loaded)


@curate_app.command()
def show(
    config: CurateFile,
    step: Annotated[
        str | None, typer.Option(help="split, embed, select, annotate or check; default: the last that is done.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(help="Most rows of the page, spread evenly.", min=1)] = 40,
    html: Annotated[
        Path | None, typer.Option(help="Page to write; default: STEP.html in the curation's folder.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a page with what a step gave and what it removed."""
    from eagle_train.watching.curation import write_page

    loaded = _load(config, overrides)
    with writing("--html", html) if html is not None else nullcontext():
        path = write_page(loaded, step=step, rows=rows, path=html)
    print(f"wrote {path}")


def _load(path: Path, overrides: list[str] | None, executor: str | None = None) -> CurateConfig:
    from eagle_train.curate.settings import load_curation

    return load_curation(path, with_executor(overrides, executor, "executor"))


def _split(config: CurateConfig) -> None:
    from eagle_train.curate.split import split
    from eagle_train.watching.progress import counting

    with counting("split", "videos") as progress:
        table = split(config, progress=progress)
    print(f"split: {table.num_rows} clips, {_hours(table)}{_removed(config, 'split')}")
    _need_rows(config, "split", table.num_rows)


def _embed(config: CurateConfig) -> None:
    from eagle_train.curate.embed import embed
    from eagle_train.watching.progress import counting

    with counting("embed", "videos") as progress:
        table = embed(config, progress=progress)
    print(f"embed: {table.num_rows} clips{_removed(config, 'embed')}")
    _need_rows(config, "embed", table.num_rows)


def _select(config: CurateConfig) -> None:
    from eagle_train.curate.select import select
    from eagle_train.watching.progress import counting

    with counting("select", "clips") as progress:
        table = select(config, progress=progress)
    print(f"select: {table.num_rows} clips, {_hours(table)}{_removed(config, 'select')}")
    _need_rows(config, "select", table.num_rows)


def _annotate(config: CurateConfig, batch_out: Path | None, batch_in: Path | None) -> None:
    from eagle_train.curate.annotate import annotate
    from eagle_train.watching.progress import counting

    with counting("annotate", "clips and chapters") as progress:
        report = annotate(config, batch_out=batch_out, batch_in=batch_in, progress=progress)
    for problem in report.problems:
        print(f"batch: {problem}")
    if report.pending:
        print(f"annotate: {report.pending} requests written to {batch_out}; run again with --batch-in RESULTS --batch-out NEXT")
        return
    print(f"annotate: {report.rows} pairs{_removed(config, 'annotate')}; {_account(report.account)}")
    _need_rows(config, "annotate", report.rows)


def _check(config: CurateConfig) -> None:
    from eagle_train.curate.check import check
    from eagle_train.watching.progress import counting

    from .tables import table

    with counting("check", "pairs") as progress:
        report = check(config, progress=progress)
    print(f"check: {report.rows} pairs{_removed(config, 'check')}; {_account(report.account)}")
    _need_rows(config, "check", report.rows)
    for name, counts in report.mixture.items():
        print(table([(name, "pairs"), *((key, str(number)) for key, number in counts.most_common())]))
    print(f"recipe: {config.folder / 'recipe.yaml'}")


def _need_rows(config: CurateConfig, step: str, rows: int) -> None:
    """A step that kept nothing fails: the next one would have nothing to read."""
    from eagle_train.curate.folder import CurateError, Folder

    if not rows:
        raise CurateError(f"eagle curate {step} kept no rows; {Folder(config.folder).ledger.path} says why each one was removed")


def _hours(clips: Any) -> str:
    return f"{float((clips['end'].to_numpy() - clips['start'].to_numpy()).sum()) / 3600:.2f} hours"


def _removed(config: CurateConfig, step: str) -> str:
    from eagle_train.curate.folder import Folder, where

    counts = {reason: number for (place, reason), number in Folder(config.folder).ledger.counts().items() if place == where(step)}
    parts = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items(), key=lambda item: -item[1]))
    return f"; ledger: {parts}" if parts else ""


def _account(account: Account) -> str:
    text = f"{account.requests} requests, {account.known} answers known, {account.input_tokens} + {account.output_tokens} tokens"
    return f"{text}, cost {account.cost:.2f}" if account.cost else text
