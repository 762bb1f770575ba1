"""`eagle plan`: the stages of a run before it is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app
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
    gpu: Annotated[str, typer.Option(help="With --gpus: which GPU, for example H200 or A100.", metavar="NAME")] = "H100",
    show_defaults: ShowDefaults = False,
) -> None:
    """Print stages, steps and packs, and what does not fit."""
    from eagle_train.config import load_config
    from eagle_train.runs.ready import get_ready
    from eagle_train.watching.progress import prepare_progress

    from .tables import PLAN_LEGEND, defaults_text, plan_table, position_warnings, prediction_text, resources_text, rows_line

    loaded = load_config(config, overrides or ())
    if show_defaults:
        print(defaults_text(loaded))
    with prepare_progress() as progress:
        ready = get_ready(loaded, progress=progress, held_out=False)
    ready.record_drops()
    print(plan_table(ready.schedules))
    print(PLAN_LEGEND)
    print(rows_line(ready.schedules))
    for warning in position_warnings(ready):
        print(warning)
    if gpus is None:
        print(f"parameters, memory and time: eagle plan {config} --gpus N --gpu H100")
    else:
        from eagle_train.runs.prediction import assumed_rate, check_fits, measured_rate, named_gpu, predict
        from eagle_train.runs.resources import resources

        card = named_gpu(gpu)
        print(resources_text(resources(ready, gpus)))
        rate = measured_rate(loaded) or assumed_rate(card)
        print(prediction_text(predict(ready, gpus, rate), gpus, rate))
        check_fits(ready, gpus, card)
