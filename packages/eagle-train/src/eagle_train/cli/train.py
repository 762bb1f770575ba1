"""`eagle train`: train a run, or the quickstart."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app
from .options import Device, Overrides, Processes, ShowDefaults

if TYPE_CHECKING:
    from eagle_train.training.startup import StartUp
    from eagle_train.training.stop import StopSignals
    from eagle_train.training.trainer import Trainer


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Configuration (YAML), or the word quickstart.", show_default=False)],
    overrides: Overrides = None,
    device: Device = None,
    show_defaults: ShowDefaults = False,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="quickstart only: folder of its data and its run; default: runs.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="quickstart only: remove an earlier quickstart run first.")] = False,
    nproc: Processes = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines, each with the same command.", metavar="N")] = 1,
    rdzv: Annotated[
        str | None,
        typer.Option(help="With --nodes: the machine where all meet, the same for each.", metavar="HOST[:PORT]", show_default=False),
    ] = None,
    profile: Annotated[
        int | None,
        typer.Option(min=1, help="Write a torch profile of so many steps, after two others.", metavar="STEPS", show_default=False),
    ] = None,
    print_launch: Annotated[
        str | None, typer.Option(help="Print a batch script instead; slurm is known.", metavar="SYSTEM", show_default=False)
    ] = None,
) -> None:
    """Prepare, plan, train all stages, evaluate. The same command continues an interrupted run.

    One process per visible GPU is started, unless torchrun or SLURM started this one among others.
    """
    from . import launch

    if print_launch is not None:
        _print_launch(print_launch, config, overrides, nproc, nodes)
        return
    if not launch.join_slurm() and not launch.is_launched() and config != "quickstart":
        _launch(config, overrides, device, nproc, nodes, rdzv)
    if config == "quickstart":
        # Its operations are too small for more threads: with two, a run took 332 s on two idle cores (2026-11-28).
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    from eagle_train.config import ConfigError
    from eagle_train.training.startup import StartUp

    startup = StartUp.of_command()
    startup.over("launch")
    from eagle_train.training.stop import StopSignals

    from .progress import is_main_rank, quiet

    quiet()
    with StopSignals(quiet=not is_main_rank()) as stop:
        if config == "quickstart":
            if profile is not None:
                raise ConfigError("--profile is for a run of your own; the quickstart has a fixed course")
            _quickstart(folder, fresh, overrides, device, stop)
        else:
            _train(config, folder is not None or fresh, overrides, device, show_defaults, stop, profile, startup)


def _print_launch(system: str, path: str, overrides: list[str] | None, nproc: int | None, nodes: int) -> None:
    from eagle_train.config import ConfigError, load_config

    from . import launch

    if system != "slurm":
        raise ConfigError(f"--print-launch {system}: expected slurm")
    config = load_config(path, overrides or ())
    print(launch.slurm_script(launch.without_launch_options(sys.argv[1:]), nproc, nodes, config.run.name))


def _launch(path: str, overrides: list[str] | None, device: str | None, nproc: int | None, nodes: int, rdzv: str | None) -> None:
    from eagle_train.config import load_config

    from .ranks import launch_ranks

    config = load_config(path, overrides or ())  # what is wrong with it is reported once
    launch_ranks(nproc, device, config.run.name, nodes=nodes, rendezvous=rdzv)


def _quickstart(folder: Path | None, fresh: bool, overrides: list[str] | None, device: str | None, stop: StopSignals) -> None:
    from eagle_train.quickstart.quickstart import Tables, run_quickstart

    from .progress import Printer
    from .tables import frames_table, plan_table, score_table

    tables = Tables(plan_table, score_table, frames_table)
    run_quickstart(folder or Path("runs"), Printer(), overrides=overrides or (), fresh=fresh, device=device, tables=tables, stop=stop)


def _train(
    path: str,
    quickstarts: bool,
    overrides: list[str] | None,
    device: str | None,
    show_defaults: bool,
    stop: StopSignals,
    profile: int | None,
    startup: StartUp,
) -> None:
    from eagle_train.config import ConfigError, load_config
    from eagle_train.training.stop import what_is_saved

    if quickstarts:
        raise ConfigError("--dir and --fresh are the quickstart's; the folder of another run is its run.dir and run.name")
    config = load_config(path, overrides or ())
    stop.describe = lambda: what_is_saved(config.run.folder, config.stages[-1].name, began=stop.training)

    from eagle_train.distributed.world import device_kind, start_world
    from eagle_train.runs.folder import resolve_dtype
    from eagle_train.runs.ready import get_ready
    from eagle_train.runs.train import train
    from eagle_train.watching.pictures import SamplePictures
    from eagle_train.watching.report import write_report
    from eagle_train.watching.trackers import open_trackers

    from .progress import Printer
    from .tables import defaults_text, plan_table, position_warnings, rows_line, score_table, start_line

    startup.over("imports")
    device = device_kind(device)
    config = resolve_dtype(config, device)
    world = start_world(config.parallel, device)
    startup.over("process group")
    printer = Printer(silent=not world.is_main)
    if show_defaults:
        printer.message(defaults_text(config))
    try:
        with printer.preparing() as progress:
            ready = get_ready(config, world, progress)
        startup.over("facts")
        if world.is_main:  # a summary reads the whole plan
            printer.message(plan_table(ready.schedules))
            for warning in position_warnings(ready):
                printer.message(warning)
        startup.over("plans")
        printer.message(f"loading {config.model.origin}, {config.parallel.dtype} on {world.device.type}")

        def started(trainer: Trainer) -> None:
            printer.message(start_line(trainer))

        pictures = SamplePictures(ready)
        with open_trackers(config, main=world.is_main) as trackers:

            def recorded(record: dict[str, Any]) -> None:
                if "start" in record:
                    printer.message(startup.line())
                printer.record(record)
                trackers.record(record)

            trained = train(
                ready,
                world,
                on_record=recorded,
                on_start=started,
                stop=stop,
                on_slow=printer.message,
                on_answers=lambda answers: trackers.answers(answers, pictures),
                profile=profile,
                startup=startup,
            )
        result = trained.final_evaluation(limit=config.eval.limit)
        if world.is_main and result is not None:
            result.write(config.run.folder / "answers.jsonl")
            printer.message(score_table(result))
        if world.is_main:
            write_report(config.run.folder)
            printer.message(rows_line(ready.schedules, trained.trainer.missing, trained.trainer.concealed))
            folder = shlex.quote(str(config.run.folder))
            printer.message(f"run folder: {config.run.folder}\ntry it: eagle chat {folder} --image picture.png 'a question'")
        trained.check_evaluations()
    finally:
        world.close()
