"""`eagle lmdb build` and `eagle lmdb check`: images in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app

lmdb_app = typer.Typer(help="Images in one file: build an LMDB, or check one.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lmdb_app, name="lmdb")


@lmdb_app.command("build")
def build(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="LMDB to write.", show_default=False)],
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE", help="Folders, image files, tar or Parquet shards.", show_default=False)
    ],
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the images in Parquet shards; needed where several could be.")
    ] = None,
) -> None:
    """Put images into one LMDB; continues where it stopped. A file is an image by its content, whatever its name."""
    from eagle_sampling import build_lmdb

    report = build_lmdb(output, sources, column=column)
    _print_problems(report.problems)
    print(f"{output}: {report}")
    if report.problems:
        raise typer.Exit(3)


@lmdb_app.command("check")
def check(path: Annotated[Path, typer.Argument(metavar="LMDB", help="LMDB to read.", show_default=False)]) -> None:
    """Read every value; name those that are damaged or not images."""
    from eagle_sampling import check_lmdb

    report = check_lmdb(path)
    _print_problems(report.problems)
    print(f"{path}: {report}")
    if not report.ok:
        raise typer.Exit(3)


def _print_problems(problems: list[tuple[str, str]]) -> None:
    for key, reason in problems[:20]:
        print(f"{key}: {reason}" if key else reason)
    if len(problems) > 20:
        print(f"and {len(problems) - 20} more")
