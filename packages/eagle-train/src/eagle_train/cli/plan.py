"""`eagle plan`: the stages of a run before it is trained."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from eagle_train.errors import counted

from .app import app
from .documents import AsJson, plan_document, write, writing
from .options import ConfigFile, Overrides, ShowDefaults


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also print parameters, memory of each of N GPUs, step times and GPU hours; fails when it can't fit.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Also write how often every row is trained in each stage: Parquet, or CSV by its suffix.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="With --gpus: which GPU, for example H200 or A100.", metavar="NAME")] = "H100",
    show_defaults: ShowDefaults = False,
    as_json: AsJson = False,
) -> None:
    """Print stages, steps and packs, and what does not fit."""
    from eagle_train.config import ConfigError, load_config
    from eagle_train.runs.prediction import check_fits, named_gpu, predict
    from eagle_train.runs.ready import get_ready
    from eagle_train.runs.resources import resources
    from eagle_train.watching.progress import prepare_progress

    from .tables import (
        PLAN_LEGEND,
        defaults_text,
        draws_table,
        plan_table,
        position_warnings,
        prediction_text,
        resources_text,
        rows_line,
    )

    loaded = load_config(config, overrides or ())
    if show_defaults and not as_json:
        print(defaults_text(loaded))
    with prepare_progress() as progress:
        ready = get_ready(loaded, progress=progress, held_out=False)
    ready.record_drops()
    needed = predicted = None
    if gpus is not None:
        needed, predicted = resources(ready, gpus, named_gpu(gpu)), predict(ready, gpus, named_gpu(gpu))
    written = 0
    if rows is not None:
        from eagle_train.runs.draws import write_draws

        with writing("--rows", rows):
            written = write_draws(ready.schedules, rows)
    if as_json:
        problem: ConfigError | None = None
        if predicted is not None:
            try:
                check_fits(ready, predicted.gpus, named_gpu(gpu))
            except ConfigError as error:
                problem = error
        write(plan_document(ready, needed, predicted, loaded if show_defaults else None, problem))
        if problem is not None:
            raise problem
        return
    print(plan_table(ready.schedules))
    print(PLAN_LEGEND)
    if draws := draws_table(ready.schedules):
        print(draws)
    print(rows_line(ready.schedules))
    for warning in position_warnings(ready):
        print(warning)
    if rows is not None:
        print(f"wrote {rows}: {counted(written, 'row')}")
    if needed is None or predicted is None:
        print(f"parameters, memory and time: eagle plan {shlex.quote(str(config))} --gpus N --gpu H100")
        return
    print(resources_text(needed))
    print(prediction_text(predicted.stages, predicted.gpus, predicted.rate))
    check_fits(ready, predicted.gpus, named_gpu(gpu))
