"""`eagle eval`: score a model on held-out rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app
from .options import Checkpoint, Device, ModelFolder

if TYPE_CHECKING:
    from eagle_train.config import Source
    from eagle_train.data.facts import Facts
    from eagle_train.evaluation.metrics import Evaluation

    from .progress import Printer


@app.command("eval")
def evaluate(
    folder: ModelFolder,
    data: Annotated[
        Path | None,
        typer.Option(help="Annotation file instead of the run's held-out rows; required for a model.", metavar="FILE", show_default=False),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of --data's media; default: that of the file.", metavar="DIR", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of each source.", metavar="N", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; default: eval.max_new_tokens.", metavar="N", show_default=False)
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
) -> None:
    """Evaluate held-out questions by exact match; for a run, next to the text-only baseline."""
    from eagle_train.config import Source

    from .progress import quiet

    quiet()
    source = Source(annotation=data.absolute(), root=root.absolute() if root else None) if data is not None else None
    if (folder / "config.yaml").is_file():
        _evaluate_run(folder, source, limit, max_new_tokens, checkpoint, out, device)
    else:
        _evaluate_model(folder, source, limit, max_new_tokens, checkpoint, out, device)


def _evaluate_run(
    run: Path,
    source: Source | None,
    limit: int | None,
    max_new_tokens: int | None,
    checkpoint: str | None,
    out: Path | None,
    device: str | None,
) -> None:
    from eagle_train.distributed.world import for_evaluation, start_world
    from eagle_train.runs.evaluate import Evaluator
    from eagle_train.runs.export import load_trained
    from eagle_train.runs.folder import open_run
    from eagle_train.runs.ready import get_ready
    from eagle_train.training.checkpoint import find_checkpoint

    from .progress import Printer

    config = open_run(run)
    if source is not None:
        config = config.replaced(data=config.data.replaced(eval_recipe=None, eval_sources={source.annotation.stem: source}))
    if max_new_tokens is not None:
        config = config.replaced(eval=config.eval.replaced(max_new_tokens=max_new_tokens))
    path = find_checkpoint(config.run.folder / "checkpoints", checkpoint) if checkpoint is not None else None
    world = start_world(for_evaluation(config.parallel), device)
    printer = Printer(silent=not world.is_main)
    # Files of the run do not change: the ledger of this evaluation is in its own folder, and facts are shared.
    folder = world.gather(evaluation_folder(config.run.folder / "evaluations", "", out))[0]
    trained, facts = config, config.data.replaced(facts=config.facts_folder)
    config = config.replaced(data=facts, run=config.run.replaced(dir=folder.parent, name=folder.name))
    with printer.preparing() as progress:
        ready = get_ready(config, world, progress)
    model, at = load_trained(trained, ready.tokenizer, world, path)
    printer.message(f"{run}: stage {at.stage_name}, step {at.step}")
    with printer.counting("questions") as counted:
        result = Evaluator(ready, world).evaluate(model, at.total_steps, limit=limit, progress=counted)
    _print_result(printer, result, ready.eval_facts, folder, baseline=True)
    world.close()


def _evaluate_model(
    model: Path,
    source: Source | None,
    limit: int | None,
    max_new_tokens: int | None,
    checkpoint: str | None,
    out: Path | None,
    device: str | None,
) -> None:
    from eagle_train.config import ConfigError, ParallelConfig
    from eagle_train.distributed.world import for_evaluation, start_world
    from eagle_train.runs.exported import evaluate_exported
    from eagle_train.training.model import check_model_folder

    from .progress import Printer

    check_model_folder(model)
    if source is None:
        raise ConfigError(f"{model} is the folder of a model, which has no held-out rows; name an annotation file with --data FILE")
    if checkpoint is not None:
        raise ConfigError(f"--checkpoint {checkpoint}: {model} is the folder of a model; only a run has checkpoints")
    world = start_world(for_evaluation(ParallelConfig()), device)
    printer = Printer(silent=not world.is_main)
    folder = world.gather(evaluation_folder(Path("evaluations").absolute(), f"{model.resolve().name}-", out))[0]
    with printer.preparing() as measured, printer.counting("questions") as counted:
        result, facts = evaluate_exported(
            model.absolute(), source, folder, world, limit=limit, max_new_tokens=max_new_tokens, on_prepare=measured, on_answer=counted
        )
    _print_result(printer, result, facts, folder, baseline=False)
    world.close()


def _print_result(printer: Printer, result: Evaluation, facts: Facts | None, folder: Path, *, baseline: bool) -> None:
    from .tables import counted, score_table

    if printer.silent:
        return
    for source in facts.sources if facts is not None else ():
        if source.bad_rows:
            print(f"{source.name}: {counted(source.bad_rows, 'row')} can't be evaluated; see {folder / 'ledger.jsonl'}")
    print(score_table(result, baseline=baseline))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"answers: {result.write(folder / 'answers.jsonl')}")


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
