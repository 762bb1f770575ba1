"""`eagle eval`: score a model on held-out rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Checkpoint, Device, RunFolder


@app.command("eval")
def evaluate(
    run: RunFolder,
    data: Annotated[Path | None, typer.Option(help="Annotation file instead of the held-out rows.", show_default=False)] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of --data's media; default: that of the file.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each source.", show_default=False)] = None,
    checkpoint: Checkpoint = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for answers and ledger; default: RUN/evaluations/<time>.", show_default=False)
    ] = None,
    device: Device = None,
) -> None:
    """Evaluate held-out questions by exact match, next to the text-only baseline."""
    from eagle_train.config import Source
    from eagle_train.distributed.world import for_evaluation, start_world
    from eagle_train.runs.evaluate import Evaluator
    from eagle_train.runs.export import load_trained
    from eagle_train.runs.folder import open_run
    from eagle_train.runs.ready import get_ready
    from eagle_train.training.checkpoint import find_checkpoint

    from .progress import Printer, quiet
    from .tables import score_table

    quiet()
    config = open_run(run)
    if data is not None:
        source = Source(annotation=data.absolute(), root=root.absolute() if root else None)
        config = config.replaced(data=config.data.replaced(eval_recipe=None, eval_sources={data.stem: source}))
    path = find_checkpoint(config.run.folder / "checkpoints", checkpoint) if checkpoint is not None else None
    world = start_world(for_evaluation(config.parallel), device)
    printer = Printer(silent=not world.is_main)
    # Files of the run do not change: the ledger of this evaluation is in its own folder, and facts are shared.
    folder = world.gather(evaluation_folder(config.run.folder, out))[0]
    trained, facts = config, config.data.replaced(facts=config.facts_folder)
    config = config.replaced(data=facts, run=config.run.replaced(dir=folder.parent, name=folder.name))
    with printer.preparing() as progress:
        ready = get_ready(config, world, progress)
    for source in ready.eval_facts.sources if ready.eval_facts is not None else ():
        if source.bad_rows:
            printer.message(f"{source.name}: {source.bad_rows} rows can't be evaluated; see {config.run.folder / 'ledger.jsonl'}")
    model, at = load_trained(trained, ready.tokenizer, world, path)
    printer.message(f"{run}: stage {at.stage_name}, step {at.step}")
    with printer.counting("questions") as counted:
        result = Evaluator(ready, world).evaluate(model, at.total_steps, limit=limit, progress=counted)
    if world.is_main:
        print(score_table(result))
        folder.mkdir(parents=True, exist_ok=True)
        print(f"answers: {result.write(folder / 'answers.jsonl')}")
    world.close()


def evaluation_folder(run: Path, out: Path | None) -> Path:
    """Where an evaluation writes: `out`, or a folder of the run named by the time. Raises ConfigError when there is something already."""
    from eagle_train.config import ConfigError

    folder = out.absolute() if out is not None else run / "evaluations" / time.strftime("%Y-%m-%dT%H-%M-%S")
    if out is None:
        number, free = 1, folder
        while folder.exists():
            number += 1
            folder = free.with_name(f"{free.name}-{number}")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder; name another one")
    return folder
