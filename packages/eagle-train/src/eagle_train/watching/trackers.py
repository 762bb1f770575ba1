"""Metrics of a run in other programs: TensorBoard, Weights & Biases, MLflow, Trackio. `metrics.jsonl` is always written, whatever these do.

A tracker is a class with `log` and `close`, and a row in `TRACKERS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from eagle_train.config import Config, ConfigError

logger = logging.getLogger(__name__)

ANSWERS = 16
"""Answers of an evaluation that trackers show."""

COLUMNS = ("question", "expected", "given")


class Shown(NamedTuple):
    """An answer of an evaluation. picture: what the model sees of its media, uint8 [h, w, 3]; None without media."""

    question: str
    expected: str
    given: str
    picture: np.ndarray | None = None

    @property
    def texts(self) -> list[str]:
        """Question, expected and given answer (`COLUMNS`)."""
        return [self.question, self.expected, self.given]

    @property
    def caption(self) -> str:
        """The texts under the picture."""
        return f"{self.question} expected: {self.expected}; given: {self.given}"


class Tracker(Protocol):
    """What a tracker does. It is made on the main rank with the configuration of the run and the options of its entry."""

    def log(self, step: int, scalars: dict[str, float], answers: Sequence[Shown]) -> None:
        """Numbers by name, and some answers of an evaluation, after optimizer step `step` of the run."""

    def close(self) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in `<run folder>/tensorboard`. options: those of `torch.utils.tensorboard.SummaryWriter`."""

    def __init__(self, config: Config, options: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._options = {"log_dir": str(config.run.folder / "tensorboard")} | options
        self._make, self._writer = SummaryWriter, None

    def log(self, step: int, scalars: dict[str, float], answers: Sequence[Shown]) -> None:
        if self._writer is None:  # what an interrupted run wrote after its checkpoint comes again
            self._writer = self._make(**({"purge_step": step} | self._options))  # pyright: ignore[reportArgumentType]
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        if answers:
            rows = "\n".join("| " + " | ".join(_cell(text) for text in answer.texts) + " |" for answer in answers)
            self._writer.add_text("eval/answers", f"| {' | '.join(COLUMNS)} |\n|---|---|---|\n{rows}", step)
        for number, answer in enumerate(answers, 1):
            if answer.picture is not None:
                self._writer.add_image(f"eval/pictures/{number:02d}", answer.picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases, in `<run folder>/wandb`; a run that continues has the same id. options: those of `wandb.init`."""

    def __init__(self, config: Config, options: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        folder = config.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "wandb-run-id.txt"
        own = {"project": "eagle", "name": config.run.name, "dir": str(folder), "config": config.model_dump(mode="json")}
        if file.is_file():
            own |= {"id": file.read_text().strip(), "resume": "allow"}
        self._wandb, self._run = wandb, wandb.init(**(own | options))
        file.write_text(f"{self._run.id}\n")

    def log(self, step: int, scalars: dict[str, float], answers: Sequence[Shown]) -> None:
        content: dict[str, Any] = dict(scalars)
        if answers:
            content["eval/answers"] = self._wandb.Table(columns=list(COLUMNS), data=[answer.texts for answer in answers])
        # Not in the table: offline, pictures of a table are kept outside of the run folder.
        pictures = [self._wandb.Image(answer.picture, caption=answer.caption) for answer in answers if answer.picture is not None]
        if pictures:
            content["eval/pictures"] = pictures
        self._run.log(content, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, in `<run folder>/mlflow` unless `tracking_uri` is among the options. options: experiment, tracking_uri."""

    def __init__(self, config: Config, options: dict[str, Any]) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        unknown = set(options) - {"experiment", "tracking_uri"}
        if unknown:
            raise ConfigError(f"trackers: mlflow has no option {', '.join(sorted(unknown))}; known: experiment, tracking_uri")
        file = config.run.folder / "mlflow-run-id.txt"
        config.run.folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(options.get("tracking_uri", f"sqlite:///{config.run.folder / 'mlflow.db'}"))
        mlflow.set_experiment(options.get("experiment", "eagle"))
        known = file.read_text().strip() if file.is_file() else None
        run = mlflow.start_run(run_id=known, run_name=None if known else config.run.name)
        file.write_text(f"{run.info.run_id}\n")
        self._mlflow = mlflow

    def log(self, step: int, scalars: dict[str, float], answers: Sequence[Shown]) -> None:
        self._mlflow.log_metrics(scalars, step=step)
        if answers:
            columns = {name: [answer.texts[place] for answer in answers] for place, name in enumerate(COLUMNS)}
            self._mlflow.log_dict(columns, f"answers-{step:08d}.json")
        for number, answer in enumerate(answers, 1):
            if answer.picture is not None:
                self._mlflow.log_image(answer.picture, f"answers-{step:08d}/{number:02d}.png")

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """A run of Trackio. options: those of `trackio.init`."""

    def __init__(self, config: Config, options: dict[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        own = {"project": "eagle", "name": config.run.name, "config": config.model_dump(mode="json"), "resume": "allow"}
        self._trackio = trackio
        trackio.init(**(own | options))

    def log(self, step: int, scalars: dict[str, float], answers: Sequence[Shown]) -> None:
        content: dict[str, Any] = dict(scalars)
        if answers:
            content["eval/answers"] = "\n".join(" | ".join(answer.texts) for answer in answers)
        for number, answer in enumerate(answers, 1):
            if answer.picture is not None:
                content[f"eval/pictures/{number:02d}"] = self._trackio.Image(answer.picture, caption=answer.caption)
        self._trackio.log(content, step=step)

    def close(self) -> None:
        self._trackio.finish()


#: Trackers by the name in `trackers`, and the package that each needs.
TRACKERS: dict[str, tuple[Callable[[Config, dict[str, Any]], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}


class Trackers:
    """Forwards the records of `metrics.jsonl` to the trackers of a run.

    One that fails is closed and not used again, with a message: training does not depend on it.
    """

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._trackers = trackers
        self._answers: list[Shown] = []

    def record(self, record: dict[str, Any]) -> None:
        """A record of `metrics.jsonl`."""
        answers = self._answers if record["kind"] in ("eval", "final") else []
        numbers = scalars(record)
        for name, tracker in list(self._trackers.items()):
            if numbers:
                self._call(name, lambda tracker=tracker: tracker.log(record["total_step"], numbers, answers))

    def answers(self, answers: Sequence[Any], picture: Callable[[Any], np.ndarray | None] = lambda answer: None) -> None:
        """The answers of the evaluation whose record comes next; the first `ANSWERS` are shown, each with `picture(answer)`."""
        if self._trackers:
            chosen = answers[:ANSWERS]
            self._answers = [Shown(answer.question, answer.expected, answer.given, picture(answer)) for answer in chosen]

    def close(self) -> None:
        """End all trackers."""
        for name, tracker in list(self._trackers.items()):
            self._call(name, tracker.close)

    def _call(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            del self._trackers[name]
            logger.error(
                "tracker %s failed (%s: %s) and is not used again by this command; metrics.jsonl is complete",
                name,
                type(error).__name__,
                error,
            )


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, with `train/` or the record's kind in front, and the keys of nested ones joined by `/`."""
    prefix = {"step": "train", "final": "eval"}.get(record["kind"], record["kind"])
    return dict(_numbers({key: value for key, value in record.items() if key not in ("step", "steps", "total_step")}, prefix))  # pyright: ignore[reportArgumentType]


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}/{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@contextmanager
def open_trackers(config: Config, *, main: bool = True) -> Iterator[Trackers]:
    """The trackers of a run, closed at the end. main: whether this is the main rank; others have none.

    Raises ConfigError when the package of a tracker is missing, naming the command that installs it.
    """
    made: dict[str, Tracker] = {}
    trackers = Trackers(made)
    try:
        for entry in config.trackers if main else []:
            make, package = TRACKERS[entry.name]
            try:
                made[entry.name] = make(config, entry.options)
            except ImportError as error:
                raise ConfigError(f"trackers: {entry.name} needs the package {package} ({error}): pip install {package}") from error
            except TypeError as error:
                raise ConfigError(f"trackers: {entry.name}: {error}; check its options") from error
        yield trackers
    finally:
        trackers.close()
