"""`eagle plan`: the stages of a run before it is trained."""

from __future__ import annotations

from .app import app
from .options import ConfigFile, Overrides, ShowDefaults


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    show_defaults: ShowDefaults = False,
) -> None:
    """Print what would be trained: stages, steps, packs, how full they are, and what does not fit."""
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
