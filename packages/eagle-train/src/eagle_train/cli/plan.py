"""`eagle plan`: the stages of a run before it is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app
from .documents import AsJson, plan_document, write
from .options import ConfigFile, Overrides, ShowDefaults


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Also print parameters, and the memory of each of N GPUs.", metavar="N", show_default=False),
    ] = None,
    show_defaults: ShowDefaults = False,
    as_json: AsJson = False,
) -> None:
    """Print stages, steps and packs, and what does not fit."""
    from eagle_train.config import load_config
    from eagle_train.runs.ready import get_ready
    from eagle_train.watching.progress import prepare_progress

    from .tables import PLAN_LEGEND, defaults_text, plan_table, position_warnings, resources_text, rows_line

    loaded = load_config(config, overrides or ())
    if show_defaults and not as_json:
        print(defaults_text(loaded))
    with prepare_progress() as progress:
        ready = get_ready(loaded, progress=progress, held_out=False)
    ready.record_drops()
    needed = None
    if gpus is not None:
        from eagle_train.runs.resources import resources

        needed = resources(ready, gpus)
    if as_json:
        write(plan_document(ready, needed, loaded if show_defaults else None))
        return
    print(plan_table(ready.schedules))
    print(PLAN_LEGEND)
    print(rows_line(ready.schedules))
    for warning in position_warnings(ready):
        print(warning)
    print(f"parameters and memory: eagle plan {config} --gpus N" if needed is None else resources_text(needed))
