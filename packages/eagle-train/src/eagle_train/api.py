"""The Python API: what the verbs of the command do, as functions of a configuration. One process; many ranks start the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_train.config import Config

if TYPE_CHECKING:
    from eagle_train.data.prepare import PrepareReport, Progress
    from eagle_train.evaluation.metrics import Evaluation
    from eagle_train.executors import Executor
    from eagle_train.planning.stages import StageSchedule
    from eagle_train.runs.train import Trained


def prepare(
    config: Config,
    *,
    evaluation: bool = False,
    again: bool = False,
    executor: Executor = "local",
    progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Measure every row of the training sources (of the held-out ones with `evaluation`), or find it measured.

    again: measure rows again that were not used because of their media. executor: `local` processes, or `ray`: a cluster.
    Raises PrepareError (too many bad rows) and ConfigError.
    """
    from eagle_train.data.prepare import prepare as measure
    from eagle_train.training.model import load_run_tokenizer

    return measure(config, load_run_tokenizer(config), evaluation=evaluation, again=again, executor=executor, progress=progress)


def plan(config: Config) -> list[StageSchedule]:
    """The plan of every stage (steps, packs, samples with their grids and frames); prepares what is not prepared, makes no model.

    Raises PrepareError, ConfigError, and ValueError for a stage without a row that fits.
    """
    from eagle_train.runs.ready import get_ready

    return get_ready(config, held_out=False).schedules


def train(config: Config, *, device: str | None = None, on_record: Callable[[dict[str, Any]], None] | None = None) -> Trained:
    """Prepare, plan, and train the remaining steps of the run, with its evaluations; `eagle train` in one process.

    device: `cpu` or `cuda`; default: a GPU when there is one. on_record: called with every record of metrics.jsonl.
    Raises ConfigError, PrepareError, TrainingError and CheckpointError.
    """
    from eagle_train.distributed.world import device_kind, start_world
    from eagle_train.runs.folder import resolve_dtype
    from eagle_train.runs.ready import get_ready
    from eagle_train.runs.train import train as train_run
    from eagle_train.watching.trackers import open_trackers

    device = device_kind(device)
    config = resolve_dtype(config, device)
    world = start_world(config.parallel, device)
    try:
        ready = get_ready(config, world)
        with open_trackers(config, main=world.is_main) as trackers:

            def recorded(record: dict[str, Any]) -> None:
                trackers.record(record)
                if on_record is not None:
                    on_record(record)

            return train_run(ready, world, on_record=recorded, on_answers=trackers.answers)
    finally:
        world.close()


def evaluate(config: Config, *, checkpoint: str | Path | None = None, device: str | None = None, limit: int | None = None) -> Evaluation:
    """Evaluate a run's newest checkpoint (or `checkpoint`) on its held-out rows, the first `limit` of each source.

    Raises ConfigError without held-out sources, CheckpointError without a checkpoint, and EvaluationError.
    """
    from eagle_train.distributed.world import alone
    from eagle_train.runs.evaluate import Evaluator
    from eagle_train.runs.export import load_trained
    from eagle_train.runs.ready import get_ready

    ready, world = get_ready(config), alone(device)
    evaluator = Evaluator(ready, world)
    model, progress = load_trained(config, ready.tokenizer, world, Path(checkpoint) if checkpoint is not None else None)
    return evaluator.evaluate(model, progress.total_steps, limit=limit)


def export(config: Config, folder: str | Path, *, checkpoint: str | Path | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Write the newest checkpoint of a run (or `checkpoint`) to `folder` in the layout of the released models, with its processor.

    dtype: `bfloat16`, `float16` or `float32`; default: float32, as trained. Returns the folder and where the weights come from.
    """
    from eagle_train.runs.export import export as export_run

    return export_run(config, Path(folder), checkpoint_path=Path(checkpoint) if checkpoint is not None else None, dtype=dtype)
