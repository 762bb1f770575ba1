"""`eagle data lint` and `eagle data stats`: keys of the rows, and what the rows hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eagle_train.errors import counted

from .app import app
from .documents import writing
from .options import ConfigFile, Overrides
from .tables import DRAWS_COLUMNS, draws_rows, table

data_app = typer.Typer(help="The rows of a run: which keys are used, and what they hold.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

HeldOut = Annotated[bool, typer.Option("--held-out", help="Use the held-out rows.")]


@data_app.command("lint")
def lint(
    config: ConfigFile,
    limit: Annotated[int | None, typer.Option(help="Rows of each source; default: all.", metavar="N", min=1, show_default=False)] = None,
    held_out: HeldOut = False,
    overrides: Overrides = None,
) -> None:
    """Print which keys of the rows are used, and refused rows.

    Media are not opened. Exit code 3 when rows are refused or a source has none.
    """
    from eagle_train.config import load_config
    from eagle_train.data.lint import lint as lint_rows

    failed = False
    for source in lint_rows(load_config(config, overrides or ()), evaluation=held_out, limit=limit):
        print(f"source {source.name}: {counted(source.rows, 'row')}")
        if not source.rows:
            print(f"refused: source {source.name} has no rows; check its annotation")
            failed = True
        if source.keys:
            print(table([("key", "rows", "use", "example"), *((use.key, str(use.rows), use.use, use.example) for use in source.keys)]))
        for refusal in source.refusals:
            print(f"refused: {refusal.reason}: {counted(refusal.rows, 'row')}, for example {refusal.example}")
            failed = True
    if failed:
        raise typer.Exit(3)


@data_app.command("stats")
def stats(
    config: ConfigFile,
    html: Annotated[Path | None, typer.Option(help="Also write a page.", metavar="FILE", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers as JSON.", metavar="FILE", show_default=False)] = None,
    held_out: HeldOut = False,
    overrides: Overrides = None,
) -> None:
    """Print rows, hours, tokens and duplicates per source.

    Also lengths before and after ADS at every context length, how often rows are drawn, and why rows are refused.
    """
    from eagle_train.config import load_config
    from eagle_train.watching.statistics import statistics, to_html, to_json

    numbers = statistics(load_config(config, overrides or ()), evaluation=held_out)
    names = ("source", "rows", "not usable", "duplicates", "images", "videos", "documents", "hours", "text tokens", "label tokens")
    rows = [
        (
            source.name,
            *map(str, (source.rows, source.bad_rows, source.duplicates, source.images, source.videos, source.documents)),
            f"{source.hours:.2f}",
            *map(str, (source.text_tokens, source.label_tokens)),
        )
        for source in numbers.sources
    ]
    print(table([names, *rows]))
    for length in numbers.lengths:
        visual = ", ".join(f"{name} {tokens}" for name, tokens in length.visual_tokens.items())
        print(f"\nstage {length.stage}: {length.max_tokens} tokens, {counted(length.dropped, 'row')} not fitting; visual tokens: {visual}")
        bins = zip(length.edges, length.before, length.after)
        if length.draws:
            print(table([("first epoch", *DRAWS_COLUMNS), *draws_rows(length.draws)]))
        print(table([("tokens", "before ADS", "after ADS"), *((f"< {edge}", str(before), str(after)) for edge, before, after in bins)]))
    for reason in numbers.reasons:
        print(f"not used: {reason}")
    for option, path, write in (("--html", html, to_html), ("--json", json, to_json)):
        if path is not None:
            text = write(numbers)
            with writing(option, path):
                path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
