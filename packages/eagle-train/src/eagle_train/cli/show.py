"""`eagle show`: a sample or a pack as the model gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .documents import AsJson, view_document, write, writing
from .options import ConfigFile, Overrides


@app.command()
def show(
    config: ConfigFile,
    row: Annotated[str | None, typer.Option(help="A row, as source:line.", metavar="SOURCE:LINE", show_default=False)] = None,
    stage: Annotated[
        str | None, typer.Option(help="Stage whose budget is used; default: the first.", metavar="NAME", show_default=False)
    ] = None,
    pack: Annotated[int, typer.Option(help="Without --row: number of the pack in the stage's first epoch.", metavar="N")] = 0,
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures.", metavar="FILE", show_default=False)] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Show a held-out row.")] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Show a sample or a pack as the model gets it.

    Tiles, frames with their times, text with its loss mask, and the budget. Rows are prepared first (eagle prepare or eagle plan).
    """
    from eagle_train.config import load_config
    from eagle_train.watching.preview import view
    from eagle_train.watching.show import to_html, to_terminal

    found = view(load_config(config, overrides or ()), row=row, stage=stage, pack=pack, evaluation=held_out)
    if html is not None:
        page = to_html(found.views, title=found.title, capacity=found.capacity)
        with writing("--html", html):
            html.write_text(page, encoding="utf-8")
    if as_json:
        write(view_document(found))
        return
    from rich.console import Console

    Console().print(to_terminal(found.views, title=found.title, capacity=found.capacity))
    if html is not None:
        print(f"wrote {html}")
