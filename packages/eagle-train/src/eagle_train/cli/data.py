"""Verbs about data and plans: init, prepare, plan, show, lmdb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import ConfigFile, Overrides, ShowDefaults

lmdb_app = typer.Typer(help="Images in one file: build an LMDB, or check one.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lmdb_app, name="lmdb")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("eagle.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Write the JSON Schema (for editors) instead.")] = False,
    vision: Annotated[
        str | None, typer.Option(help="Vision tower of a new model: folder or hub name.", metavar="SIGLIP", show_default=False)
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Its language model: folder, GGUF file or hub name.", metavar="MODEL", show_default=False)
    ] = None,
) -> None:
    """Write a commented configuration with every default.

    With --vision and --language, the first stage trains the connector alone.
    """
    import json

    from eagle_train.config import Config, ConfigError

    from .template import commented_config

    if path.exists() and not force:
        raise ConfigError(f"{path} exists; --force writes over it")
    if (vision is None) != (language is None):
        raise ConfigError("--vision and --language belong together: a new model needs both")
    parts = [_from(path.parent, name) for name in (vision, language)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(Config.json_schema(), indent=1) + "\n" if schema else commented_config(*parts), encoding="utf-8")
    print(f"wrote {path}" + ("" if schema else f"; next: fill in model and data, then eagle plan {path}"))


def _from(folder: Path, name: str | None) -> str | None:
    """A path as it is written in a file of `folder`: absolute paths and names on the hub stay as they are."""
    import os

    return os.path.relpath(name, folder) if name is not None and Path(name).exists() and not Path(name).is_absolute() else name


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Look again at rows that were left out for their media.")] = False,
) -> None:
    """Measure every row once, on all CPUs; what can't be used goes to the ledger."""
    from eagle_train.config import load_config
    from eagle_train.data.parts import MEDIA_REASONS
    from eagle_train.data.prepare import prepare as run_prepare
    from eagle_train.training.model import load_run_tokenizer
    from eagle_train.watching.progress import prepare_progress

    loaded = load_config(config, overrides or ())
    tokenizer = load_run_tokenizer(loaded)
    left_out = 0
    for evaluation in (False, True):
        if evaluation and loaded.data.eval_recipe is None and not loaded.data.eval_sources:
            continue
        with prepare_progress() as progress:
            report = run_prepare(loaded, tokenizer, evaluation=evaluation, again=again, progress=progress)
        what = "held-out rows" if evaluation else "rows"
        print(f"{report.rows} {what}: {report.good_rows} good, {report.bad_rows} in the ledger, {report.seconds:.1f} s")
        for reason, number in sorted(report.reasons.items(), key=lambda item: -item[1]):
            print(f"  {reason}: {number}")
            left_out += number if reason in MEDIA_REASONS else 0
        for note in report.notes:
            print(f"note: {note}")
    print(f"facts: {loaded.facts_folder}")
    if (loaded.run.folder / "ledger.jsonl").exists():
        print(f"ledger: {loaded.run.folder / 'ledger.jsonl'}")
    if left_out:
        print(f"{left_out} rows were left out for their media; once these are repaired, eagle prepare --again takes the rows in")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    show_defaults: ShowDefaults = False,
) -> None:
    """Say what would be trained: stages, steps, packs, how full, and what does not fit."""
    from eagle_train.config import load_config
    from eagle_train.runs.ready import get_ready
    from eagle_train.watching.progress import prepare_progress

    from .tables import defaults_text, plan_table, rows_line

    loaded = load_config(config, overrides or ())
    if show_defaults:
        print(defaults_text(loaded))
    with prepare_progress() as progress:
        ready = get_ready(loaded, progress=progress, held_out=False)
    ready.record_drops()
    print(plan_table(ready.schedules))
    print(rows_line(ready.schedules))


@app.command()
def show(
    config: ConfigFile,
    row: Annotated[str | None, typer.Option(help="A row, as source:line.", metavar="SOURCE:LINE", show_default=False)] = None,
    stage: Annotated[str | None, typer.Option(help="Stage whose budget is used; left out: the first.", show_default=False)] = None,
    pack: Annotated[int, typer.Option(help="Without --row: number of the pack in the stage's first epoch.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures.", show_default=False)] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Look at the held-out rows.")] = False,
    overrides: Overrides = None,
) -> None:
    """Show a sample or a pack as the model will see it: tiles, frames with times, text with its loss mask, the budget."""
    from rich.console import Console

    from eagle_train.config import load_config
    from eagle_train.watching.preview import view
    from eagle_train.watching.show import to_html, to_terminal

    found = view(load_config(config, overrides or ()), row=row, stage=stage, pack=pack, evaluation=held_out)
    Console().print(to_terminal(found.views, title=found.title, capacity=found.capacity))
    if html is not None:
        html.write_text(to_html(found.views, title=found.title, capacity=found.capacity), encoding="utf-8")
        print(f"wrote {html}")


@lmdb_app.command("build")
def lmdb_build(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="LMDB to write.", show_default=False)],
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE", help="Folders, image files, tar or Parquet shards.", show_default=False)
    ],
) -> None:
    """Put images into one LMDB; continues where it stopped."""
    from eagle_sampling import build_lmdb

    report = build_lmdb(output, sources)
    _problems(report.problems)
    print(f"{output}: {report}")
    if report.problems:
        raise typer.Exit(3)


@lmdb_app.command("check")
def lmdb_check(path: Annotated[Path, typer.Argument(metavar="LMDB", help="LMDB to read.", show_default=False)]) -> None:
    """Read every value of an LMDB and name those that are damaged or no images."""
    from eagle_sampling import check_lmdb

    report = check_lmdb(path)
    _problems(report.problems)
    print(f"{path}: {report}")
    if not report.ok:
        raise typer.Exit(3)


def _problems(problems: list[tuple[str, str]]) -> None:
    for key, reason in problems[:20]:
        print(f"{key}: {reason}" if key else reason)
    if len(problems) > 20:
        print(f"and {len(problems) - 20} more")
