"""`eagle clean`: facts and plans that no run needs any more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import ConfigFile, Overrides


@app.command()
def clean(
    config: ConfigFile,
    overrides: Overrides = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--run", help="Also keep what this run folder needs. May be repeated.", metavar="RUN", show_default=False),
    ] = None,
    days: Annotated[float, typer.Option("--older-than", min=0.0, help="Days since the last use.", metavar="DAYS")] = 7.0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only listed.")] = False,
) -> None:
    """List facts and plans that no run needs any more, or remove them.

    Kept is what this configuration, the runs next to it and the runs that prepared in the same data.facts need.
    """
    from eagle_train.config import load_config
    from eagle_train.runs.leftovers import leftovers, remove

    from .tables import leftovers_table

    loaded = load_config(config, overrides or ())
    found = leftovers(loaded, runs or (), days=days)
    if not found:
        print(f"{loaded.facts_folder}: every file is needed, or was used in the last {days:g} days")
        return
    print(leftovers_table(found))
    if yes:
        print(f"removed {remove(found) / (1 << 20):.1f} MiB")
    else:
        print("nothing is removed; add --yes to remove these files")
