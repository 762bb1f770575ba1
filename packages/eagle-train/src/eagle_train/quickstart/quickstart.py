"""`eagle train quickstart`: build the data, prepare, plan, train three stages, evaluate all held-out questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from eagle_train.config import load_config
from eagle_train.distributed.world import device_kind, start_world
from eagle_train.evaluation.metrics import Answer, Evaluation
from eagle_train.runs.export import export
from eagle_train.runs.folder import remove_run
from eagle_train.runs.ready import get_ready
from eagle_train.runs.sweep import write_points
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics
from eagle_train.training.stop import StopSignals, what_is_saved
from eagle_train.watching.accuracy import plot_sweep
from eagle_train.watching.pictures import SamplePictures
from eagle_train.watching.report import write_report
from eagle_train.watching.trackers import open_trackers

from .build import Size, TrainingSettings, build, configuration, settings_for, write_configuration

FRAMES = (1, 2, 4, 8)
"""Most frames of a video in the last table; the clips with a question about the order have five at most."""


class Tables(NamedTuple):
    """How results are shown as text: the plan of the stages, the scores, and those by number of frames (`eagle_train.cli.tables`)."""

    plan: Callable[..., str]
    scores: Callable[..., str]
    frames: Callable[..., str]


class Output(Protocol):
    """Where the quickstart prints (`eagle_train.cli.progress.Printer`)."""

    def message(self, text: str) -> None: ...
    def record(self, record: dict[str, Any]) -> None: ...
    def preparing(self) -> Any: ...
    def counting(self, what: str) -> Any: ...


def run_quickstart(
    folder: Path,
    printer: Output,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    size: Size | None = None,
    settings: TrainingSettings | None = None,
    device: str | None = None,
    tables: Tables | None = None,
    stop: StopSignals | None = None,
) -> Evaluation:
    """Run all steps, or continue an earlier call. Returns the answers to all held-out questions.

    fresh: remove the run that an earlier call made, first. settings: how it trains (default: as the device is fast; that of an earlier call
    unless `fresh`). device: cpu or cuda; None takes a GPU when there is one. stop: signals that are handled (default: none).
    Raises EvaluationError when the model is trained and an evaluation failed.
    """
    begin = time.monotonic()
    size, device = size or Size(), device_kind(device)

    def clock() -> str:
        return f"[{time.monotonic() - begin:5.1f} s]"

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "quickstart.yaml"
    data = folder / "quickstart-data"
    printer.message(f"{clock()} building rows from easy-VQA, encoding H.264 videos from its images, training a tokenizer")
    counts = build(data, size)
    printer.message("  " + ", ".join(f"{name}: {count} rows" for name, count in counts.items()))
    if fresh or not path.is_file():
        write_configuration(path, configuration(data, settings or settings_for(device)))
    config = load_config(path, overrides)
    if stop is not None:
        signals = stop
        stop.describe = lambda: what_is_saved(config.run.folder, config.stages[-1].name, began=signals.training)
    if fresh and config.run.folder.exists():
        remove_run(config.run.folder)
    world = start_world(config.parallel, device)
    try:
        printer.message(f"{clock()} preparing: every row is measured once, for all context lengths")
        with printer.preparing() as progress:
            ready = get_ready(config, world, progress)
        printer.message(f"{clock()} {len(ready.facts)} training rows and {len(ready.eval_facts or ())} held-out rows are ready; the plan:")

        def started(trainer: Any) -> None:
            if tables is not None:
                printer.message(tables.plan(trainer.schedules))
            parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
            printer.message(
                f"{clock()} training {parameters:,} parameters from random weights, {trainer.total_steps} steps, on {world.device.type}"
            )

        pictures = SamplePictures(ready)
        with open_trackers(config, main=world.is_main) as trackers:

            def recorded(record: dict[str, Any]) -> None:
                printer.record(record)
                trackers.record(record)

            def answered(answers: Sequence[Answer]) -> None:
                trackers.answers(answers, pictures)

            trained = train(ready, world, on_record=recorded, on_start=started, stop=stop, on_slow=printer.message, on_answers=answered)
        printer.message(f"{clock()} trained; evaluating all held-out questions")
        with printer.counting("questions") as counted:
            result = trained.final_evaluation(progress=counted)
            points = trained.evaluations_by_frames(FRAMES, ["test_videos"], progress=counted)
        if world.is_main and result is not None:
            run = config.run.folder
            result.write(run / "answers.jsonl")
            Metrics(run / "metrics.jsonl").replace(
                {
                    "kind": "final",
                    "stage": "final",
                    "total_step": trained.trainer.total_steps,
                    **result.record(),
                }
            )
            if tables is not None:
                printer.message(tables.scores(result))
            if points is not None:
                _, rows = write_points(points, run / "frames")
                plot_sweep([row for point in points for row in point.rows()], rows.with_suffix(".png"))
                if tables is not None:
                    printer.message(tables.frames(points))
            plot = write_report(run)
            export(config, run / "model", dtype="float32")
            printer.message(results_text(run, plot, data, result, clock()))
        trained.check_evaluations()
        assert result is not None
        return result
    finally:
        world.close()


def results_text(run: Path, plot: Path, data: Path, result: Evaluation, took: str) -> str:
    """Where things are, and what to try next."""
    video = data / "videos" / "test" / "0000.mp4"
    picture = _example(result)
    return "\n".join(
        [
            f"{took} done. Run folder: {run}",
            f"  plot of loss and accuracy: {plot}",
            f"  plot of accuracy by number of frames: {run / 'frames' / 'sweep.png'}",
            f"  every answer: {run / 'answers.jsonl'}",
            f"  the model as a checkpoint in Eagle 2.5's layout: {run / 'model'}",
            "Questions to it:",
            f"  eagle chat {run} --video {video} 'in what order?'",
            *([f"  eagle chat {run} --image {picture[0]} '{picture[1]}'"] if picture else []),
        ]
    )


def _example(result: Evaluation) -> tuple[str, str] | None:
    """A held-out picture and a question about it."""
    try:
        import easy_vqa
    except ImportError:
        return None
    paths = easy_vqa.get_test_image_paths()
    answer: Answer | None = next((one for one in result.answers if one.source == "test_questions"), None)
    return (paths[0], "what shape is in the image?") if answer is not None and 0 in paths else None
