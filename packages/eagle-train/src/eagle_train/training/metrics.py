"""Metrics of a run: one JSON line per logged step, which a resumed run continues without gaps or duplicates, and the progress line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from eagle_train.data.atomic import naming

TIMED = (
    "start", "seconds", "tokens_per_second", "tiles_per_second", "data_wait", "eta", "tflops", "mfu",
    "memory", "memory_peak", "memory_planned",
)  # fmt: skip
"""Fields that depend on the machine; all others are equal when the same run is repeated."""


class Metrics:
    """`metrics.jsonl`: records with `kind` ("step", "eval", "eval_failed", "final") and `total_step`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), open(self.path, "ab") as file:
            file.write(json.dumps(_plain(record), allow_nan=False).encode() + b"\n")

    def replace(self, record: dict[str, Any]) -> None:
        """Append one record in place of those of its kind at its step."""
        self._keep(lambda other: (other["kind"], other.get("total_step")) != (record["kind"], record["total_step"]))
        self.write(record)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            yield from read_metrics(self.path)

    def rewind(self, total_step: int) -> None:
        """Remove the records after step `total_step` of the run: a run that resumes there writes them again."""
        self._keep(lambda record: record.get("total_step", 0) <= total_step)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if not self.path.exists():
            return
        kept = [record for record in self if wanted(record)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in kept))
        temporary.replace(self.path)


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics file; a line cut by a crash is left out."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value, key in TIMED) if isinstance(value, float) else value for key, value in record.items()}


def _number(value: float, timed: bool) -> float | str:
    if not math.isfinite(value):  # JSON has no NaN: such a number is written as text
        return str(value)
    return round(value, 3) if timed else value


def same_run(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what depends on the machine, for comparing two runs."""
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def progress_line(record: dict[str, Any]) -> str:
    """The progress line of a step: stage, step, loss, speed, MFU where it is known, memory now and at the peak, time left."""
    parts = [
        f"{record['stage']}  step {record['step']}/{record['steps']}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if "memory" in record:
        parts.append(f"memory {record['memory'] / 2**30:.1f} (peak {record['memory_peak'] / 2**30:.1f}) GiB")
    return "  ".join([*parts, f"data wait {record['data_wait']:.1%}", f"left {duration(record['eta'])}"])


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03` or `4 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
