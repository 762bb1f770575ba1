"""`eagle eval`: score a model on held-out rows."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .app import app
from .documents import AsJson, evaluation_document, write
from .options import Checkpoint, Device, ModelFolder, Processes

if TYPE_CHECKING:
    from eagle_train.config import Config, Source
    from eagle_train.data.facts import Facts
    from eagle_train.runs.sweep import Point


class Request(NamedTuple):
    """What the command line requests. source: in place of the held-out sources. overrides: of the section eval."""

    folder: Path
    source: Source | None
    overrides: list[str]
    limit: int | None
    frames: list[int]
    lengths: list[int]
    checkpoint: str | None
    out: Path | None
    device: str | None
    ulysses: int
    all_gather: int
    as_json: bool


@app.command("eval")
def evaluate(
    folder: ModelFolder,
    data: Annotated[
        str | None,
        typer.Option(
            help="Annotation file, or its address (https://..., s3://...), instead of the run's held-out rows; required for a model.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(help="Folder or address of --data's media; default: that of the file.", metavar="DIR", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of each source.", metavar="N", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; default: eval.max_new_tokens.", metavar="N", show_default=False)
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Metric of --data: exact (default), choice, contains, anls, numeric, temporal_iou, f1, judge, teacher_forced, likelihood.",
            metavar="NAME",
            show_default=False,
            autocompletion=lambda: _metrics(),
        ),
    ] = None,
    frames: Annotated[
        str | None,
        typer.Option(help="Evaluate with at most so many frames per video: --frames 16,32,64.", metavar="N,N,...", show_default=False),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Evaluate at these context lengths: 4K,8K; default: the last stage's.", metavar="N,N,...", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the section eval: --set eval.batch_size=4. May be repeated.", metavar="KEY=VALUE"),
    ] = None,
    ulysses: Annotated[int, typer.Option(min=1, help="Ranks (inner level) that share a pack of teacher-forced scoring.", metavar="N")] = 1,
    all_gather: Annotated[
        int, typer.Option(min=1, help="Ranks (outer level) that share a pack of teacher-forced scoring.", metavar="N")
    ] = 1,
    lmms: Annotated[
        str | None,
        typer.Option(
            help="Evaluate tasks of lmms-eval, which must be installed, instead of rows.", metavar="TASK,TASK,...", show_default=False
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own for --lmms.", metavar="DIR", show_default=False)
    ] = None,
    checkpoint: Checkpoint = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for answers and ledger; default: RUN/evaluations/<time>, for a model evaluations/<name>-<time>.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    nproc: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate held-out questions, or tasks of lmms-eval.

    Every source of questions has its metric. For a run, accuracies are next to those of the text-only baseline. One process per visible GPU
    is started, which share the questions, unless torchrun or SLURM started this one among others.
    """
    from eagle_train.config import ConfigError

    from .progress import quiet

    quiet()
    if lmms is not None:
        from .lmms import evaluate_with_lmms

        others = {"--data": data, "--root": root, "--metric": metric, "--lengths": lengths, "--set": overrides}
        others |= {"--ulysses": ulysses > 1 or None, "--all-gather": all_gather > 1 or None, "--nproc": nproc}
        evaluate_with_lmms(
            folder,
            lmms,
            include=include_path,
            limit=limit,
            max_new_tokens=max_new_tokens,
            frames=numbers("--frames", frames),
            checkpoint=checkpoint,
            out=out,
            device=device,
            others=[name for name, value in others.items() if value is not None],
        )
        return
    if include_path is not None:
        raise ConfigError(f"--include-path {include_path} belongs to --lmms")
    source = _source(data, root) if data is not None else None
    changes = list(overrides or ())
    if max_new_tokens is not None:
        changes.append(f"eval.max_new_tokens={max_new_tokens}")
    if metric is not None:
        if source is None:
            raise ConfigError(f"--metric {metric} belongs to --data; for a source of the run use --set eval.metrics.SOURCE={metric}")
        if metric not in (known := _metrics()):
            raise ConfigError(f"--metric {metric}: expected one of {', '.join(known)}")
        changes.append(f"eval.metrics={json.dumps({source.stem: metric})}")  # not eval.metrics.NAME: a file's name may have dots
    request = Request(
        folder,
        source,
        changes,
        limit,
        numbers("--frames", frames),
        numbers("--lengths", lengths),
        checkpoint,
        out,
        device,
        ulysses,
        all_gather,
        as_json,
    )
    run = (folder / "config.yaml").is_file()
    _launch(request, run, nproc)
    if run:
        _evaluate_run(request)
    else:
        _evaluate_model(request)


def _launch(request: Request, run: bool, nproc: int | None) -> None:
    from . import launch

    if launch.join_slurm() or launch.is_launched():
        return
    from .ranks import launch_ranks

    check = _run_config if run else _check_model
    check(request)  # what is wrong is reported once
    if request.out is not None:
        evaluation_folder(request.out, "", request.out)

    launch_ranks(nproc, request.device, request.folder.name)


def _check_model(request: Request) -> Source:
    """The source on which the model of a folder is evaluated. Raises ConfigError for a folder, or options, that do not go with that."""
    from eagle_train.config import ConfigError
    from eagle_train.training.model import check_model_folder

    model = request.folder
    check_model_folder(model)
    if request.source is None:
        raise ConfigError(f"{model} is the folder of a model, which has no held-out rows; name an annotation file with --data FILE")
    if request.checkpoint is not None:
        raise ConfigError(f"--checkpoint {request.checkpoint}: {model} is the folder of a model; only a run has checkpoints")
    return request.source


def _source(data: str, root: str | None) -> Source:
    """The source that `--data` and `--root` name. Raises ConfigError for a place that is not there and for an address with credentials."""
    from pydantic import ValidationError

    from eagle_train.config import ConfigError, Source
    from eagle_train.config.addresses import scheme_of
    from eagle_train.data.recipe import is_pattern

    places = [None if place is None else place if scheme_of(place) else Path(place).absolute() for place in (data, root)]
    for option, place in zip(("--data", "--root"), places):
        if isinstance(place, Path) and not place.exists() and not (option == "--data" and is_pattern(place)):
            raise ConfigError(f"{option} {place} does not exist")
    try:
        return Source(annotation=places[0], root=places[1])  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(f"--data {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _metrics() -> list[str]:
    """Names of all metrics."""
    from typing import get_args

    from eagle_train.config.evaluation import MetricName

    return list(get_args(MetricName))


def numbers(option: str, text: str | None) -> list[int]:
    """`16,4K` as [16, 4096]; an empty list for None. Raises ConfigError."""
    from pydantic import TypeAdapter, ValidationError

    from eagle_train.config import ConfigError
    from eagle_train.config.section import Tokens

    if text is None:
        return []
    try:
        return TypeAdapter(list[Tokens]).validate_python([part.strip() for part in text.split(",")])
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{option} {text}: {first['input']!r} is not a number of at least 1 (4K is 4096); separate numbers by commas"
        ) from None


def _run_config(request: Request) -> Config:
    """The configuration of a run with the request's source and overrides. Raises ConfigError."""
    from eagle_train.runs.evaluate import eval_overrides
    from eagle_train.runs.folder import open_run

    config, source = open_run(request.folder), request.source
    if source is not None:
        remote = config.data.remote.replaced(schemes=sorted({*config.data.remote.schemes, *source.schemes}))
        data = config.data.replaced(eval_recipe=None, eval_sources={source.stem: source}, remote=remote)
        config = config.replaced(data=data, eval=config.eval.replaced(metrics={}))
    return eval_overrides(config, request.overrides)


def _evaluate_run(request: Request) -> None:
    from eagle_train.distributed.world import for_evaluation, start_world
    from eagle_train.runs.evaluate import Evaluator
    from eagle_train.runs.export import load_trained
    from eagle_train.runs.ready import get_ready
    from eagle_train.runs.sweep import sweep
    from eagle_train.training.checkpoint import find_checkpoint

    from .progress import Printer

    config = _run_config(request)
    path = find_checkpoint(config.run.folder / "checkpoints", request.checkpoint) if request.checkpoint is not None else None
    world = start_world(for_evaluation(config.parallel, ulysses=request.ulysses, all_gather=request.all_gather), request.device)
    printer = Printer(silent=not world.is_main or request.as_json)
    # Files of the run do not change: the ledger of this evaluation is in its own folder, and facts are shared.
    folder = world.gather(evaluation_folder(config.run.folder / "evaluations", "", request.out))[0]
    trained, facts = config, config.data.replaced(facts=config.facts_folder)
    config = config.replaced(data=facts, run=config.run.replaced(dir=folder.parent, name=folder.name))
    with printer.preparing() as progress:
        ready = get_ready(config, world, progress)
    model, at = load_trained(trained, ready.tokenizer, world, path)
    printer.message(f"{request.folder}: stage {at.stage_name}, step {at.step}")
    evaluator = Evaluator(ready, world)
    with printer.counting("questions") as counted:
        points = sweep(
            lambda frames, length: evaluator.evaluate(
                model, at.total_steps, limit=request.limit, frames=frames, max_tokens=length, progress=counted
            ),
            frames=request.frames,
            lengths=request.lengths,
        )
    if world.is_main:
        _report(request, points, ready.eval_facts, folder, asdict(at))
    world.close()


def _evaluate_model(request: Request) -> None:
    from eagle_train.config import ParallelConfig
    from eagle_train.distributed.world import for_evaluation, start_world
    from eagle_train.runs.exported import evaluate_exported

    from .progress import Printer

    model, source = request.folder, _check_model(request)
    world = start_world(for_evaluation(ParallelConfig(), ulysses=request.ulysses, all_gather=request.all_gather), request.device)
    printer = Printer(silent=not world.is_main or request.as_json)
    folder = world.gather(evaluation_folder(Path("evaluations").absolute(), f"{model.resolve().name}-", request.out))[0]
    with printer.preparing() as measured, printer.counting("questions") as counted:
        points, facts = evaluate_exported(
            model.absolute(),
            source,
            folder,
            world,
            limit=request.limit,
            overrides=request.overrides,
            frames=request.frames,
            lengths=request.lengths,
            on_prepare=measured,
            on_answer=counted,
        )
    if world.is_main:
        _report(request, points, facts, folder)
    world.close()


def _report(request: Request, points: list[Point], facts: Facts | None, folder: Path, at: dict[str, Any] | None = None) -> None:
    """Write the answers and scores, and print the scores. at: the checkpoint of a run, whose scores stand next to text-only ones."""
    from eagle_train.runs.sweep import write_points

    answers, rows = write_points(points, folder)
    files = {"scores": rows, "answers": answers}
    scores = [row for point in points for row in point.rows()]
    if len(points) > 1:
        from eagle_train.watching.accuracy import plot_sweep

        files = {"plot": plot_sweep(scores, folder / "sweep.png")} | files
    if request.as_json:
        write(evaluation_document(request.folder, at, points, facts, files))
        return
    from eagle_train.errors import counted

    from .tables import score_table, sweep_table

    for source in facts.sources if facts is not None else ():
        if source.bad_rows:
            print(f"{source.name}: {counted(source.bad_rows, 'row')} can't be evaluated; see {folder / 'ledger.jsonl'}")
    print(score_table(points[0].evaluation, baseline=points[0].baseline) if len(points) == 1 else sweep_table(scores))
    for name, path in files.items():
        print(f"{name}: {path}")


def evaluation_folder(parent: Path, prefix: str, out: Path | None) -> Path:
    """Where an evaluation writes: `out`, or a new folder of `parent` named by the time. Raises ConfigError when `out` is not empty."""
    from eagle_train.config import ConfigError

    if out is not None:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ConfigError(f"--out {out} exists and is not an empty folder; name another one")
        return out.absolute()
    folder = free = parent / f"{prefix}{time.strftime('%Y-%m-%dT%H-%M-%S')}"
    number = 1
    while folder.exists():
        number += 1
        folder = free.with_name(f"{free.name}-{number}")
    return folder
