"""What `--json` prints: one JSON document on standard output. Progress, logs and warnings of libraries go to standard error.

Names are those of the tables and of `metrics.jsonl`; sizes are in tokens and bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from eagle_train.config import Config
    from eagle_train.data.facts import Facts
    from eagle_train.runs.prediction import Prediction
    from eagle_train.runs.ready import Ready
    from eagle_train.runs.resources import Resources
    from eagle_train.runs.sweep import Point
    from eagle_train.watching.preview import View
    from eagle_train.watching.show import SampleView

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Raises ConfigError, which names the option, when what it writes can't be written there. A full disk stays what it is."""
    from eagle_train.config import ConfigError
    from eagle_train.errors import disk_is_full

    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise
        raise ConfigError(f"{option} {path}: can't be written ({error.strerror or error}); name a file in a folder that exists") from error


def write(document: dict[str, Any]) -> None:
    """Print a document; numbers that JSON lacks (NaN) become null, which no reader refuses."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def plan_document(
    ready: Ready,
    needed: Resources | None = None,
    predicted: Prediction | None = None,
    defaults: Config | None = None,
    problem: Exception | None = None,
) -> dict[str, Any]:
    """`eagle plan`: a summary per stage, where all rows went, warnings; resources, predicted times and why it does not fit (null: it fits)
    with `--gpus`, defaults with `--show-defaults`."""
    from eagle_train.config import explain_defaults

    from .tables import position_warnings, row_counts

    document: dict[str, Any] = {
        "stages": [
            {"name": schedule.stage.name, "max_tokens": schedule.stage.max_tokens}
            | {"steps_per_epoch" if name == "steps" else name: value for name, value in asdict(schedule.plan(0).summary()).items()}
            | {"steps": schedule.steps}
            for schedule in ready.schedules
        ],
        "rows": row_counts(ready.schedules),
        "warnings": list(position_warnings(ready)),
    }
    if needed is not None:
        document["resources"] = asdict(needed)
    if predicted is not None:
        hours = {stage.name: stage.gpu_hours(predicted.gpus) for stage in predicted.stages}
        stages = [asdict(stage) | {"gpu_hours": hours[stage.name]} for stage in predicted.stages]
        document["prediction"] = asdict(predicted) | {"stages": stages}
        document["problem"] = None if problem is None else str(problem)
    if defaults is not None:
        document["defaults"] = {default.path: default.value for default in explain_defaults(defaults)}
    return document


def view_document(view: View) -> dict[str, Any]:
    """`eagle show`: the samples of a pack, or one row, without pictures. capacity: `max_tokens` of a pack."""
    return {"title": view.title, "capacity": view.capacity, "samples": [_sample(sample) for sample in view.views]}


def evaluation_document(
    folder: Path, at: dict[str, Any] | None, points: Sequence[Point], facts: Facts | None, files: dict[str, Path]
) -> dict[str, Any]:
    """`eagle eval`: a score per source, number of frames and context length. at: the checkpoint of a run."""
    unusable = {source.name: source.bad_rows for source in facts.sources if source.bad_rows} if facts is not None else {}
    return {
        "model": str(folder),
        **({"checkpoint": at} if at is not None else {}),
        "scores": [row for point in points for row in point.rows()],
        "unusable_rows": unusable,
        "files": {name: str(path) for name, path in files.items()},
    }


def _sample(view: SampleView) -> dict[str, Any]:
    numbers = {name: getattr(view, name) for name in ("length", "planned", "budget", "labels", "text", "image", "frame", "shared")}
    pieces = [
        {"kind": piece.kind, "text": piece.text, "labelled": piece.labelled}
        | ({"tokens": piece.tokens} if piece.tokens else {})
        | ({"grid": [piece.grid.cols, piece.grid.rows]} if piece.grid is not None else {})
        for piece in view.pieces
    ]
    return {"source": view.source, "line": view.line, "tokens": numbers, "pieces": pieces, "notes": list(view.notes)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, (str, int)) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)
