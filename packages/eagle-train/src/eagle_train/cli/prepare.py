"""`eagle prepare`: measure the rows of all sources."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from eagle_train.errors import counted

from .app import app
from .options import ConfigFile, Overrides


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Measure rows again that were not used because of their media.")] = False,
    executor: Annotated[str, typer.Option(help="local (processes), or ray: a cluster that sees the same files.", metavar="NAME")] = "local",
) -> None:
    """Measure every row once, on all CPUs; bad rows go to the ledger."""
    from eagle_train.config import ConfigError, load_config
    from eagle_train.data.parts import MEDIA_REASONS
    from eagle_train.data.prepare import prepare as run_prepare
    from eagle_train.executors import Executor
    from eagle_train.runs.ready import has_evaluation
    from eagle_train.training.model import load_run_tokenizer
    from eagle_train.watching.progress import prepare_progress

    if executor not in get_args(Executor):
        raise ConfigError(f"--executor {executor}: expected {' or '.join(get_args(Executor))}")
    chosen: Executor = "ray" if executor == "ray" else "local"
    loaded = load_config(config, overrides or ())
    tokenizer = load_run_tokenizer(loaded)
    without_media = 0
    for evaluation in (False, True) if has_evaluation(loaded) else (False,):
        with prepare_progress() as progress:
            report = run_prepare(loaded, tokenizer, evaluation=evaluation, again=again, executor=chosen, progress=progress)
        what = "held-out row" if evaluation else "row"
        print(f"{counted(report.rows, what)}: {report.good_rows} good, {report.bad_rows} in the ledger, {report.seconds:.1f} s")
        for reason, number in sorted(report.reasons.items(), key=lambda item: -item[1]):
            print(f"  {reason}: {number}")
            without_media += number if reason in MEDIA_REASONS else 0
        for note in report.notes:
            print(f"note: {note}")
    print(f"facts: {loaded.facts_folder}")
    if (loaded.run.folder / "ledger.jsonl").exists():
        print(f"ledger: {loaded.run.folder / 'ledger.jsonl'}")
    if without_media:
        print(f"not used because of their media: {counted(without_media, 'row')}; repair the media, then run eagle prepare --again")
