"""Evaluations of one model by number of frames and by context length: what more visual input brings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eagle_train.evaluation.metrics import Evaluation


class Point(NamedTuple):
    """An evaluation with at most `frames` frames per video and a budget of `max_tokens` per sample.

    None: as the model is configured (`sampling.max_frames`, the last stage). baseline: whether there is a text-only baseline, which needs
    training rows.
    """

    frames: int | None
    max_tokens: int | None
    evaluation: Evaluation
    baseline: bool = True

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row per source: frames, max_tokens, source, unanswered (rows with a problem), the fields of `Score` and of `SourceLoss`.

        Without a baseline `text_only` is None.
        """
        losses = self.evaluation.losses
        for source, score in self.evaluation.by_source().items():
            unanswered = sum(bool(answer.problem) for answer in self.evaluation.answers if answer.source == source)
            loss = losses[source]._asdict() if source in losses else {}
            yield {
                "frames": self.frames,
                "max_tokens": self.max_tokens,
                "source": source,
                **score._asdict(),
                **({} if self.baseline else {"text_only": None}),
                **loss,
                "unanswered": unanswered,
            }


def sweep(
    evaluate_at: Callable[[int | None, int | None], Evaluation],
    *,
    frames: Sequence[int] = (),
    lengths: Sequence[int] = (),
    baseline: bool = True,
) -> list[Point]:
    """`evaluate_at(frames, max_tokens)` at every number of frames with every budget; empty: as the model is configured (None)."""
    places = itertools.product(lengths or [None], frames or [None])
    return [Point(count, length, evaluate_at(count, length), baseline) for length, count in places]


def write_points(points: Sequence[Point], folder: Path) -> tuple[Path, Path]:
    """Write `answers.jsonl` (every answer, with frames and max_tokens) and `sweep.jsonl` (`Point.rows`); returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    answers, table = folder / "answers.jsonl", folder / "sweep.jsonl"
    with open(answers, "w", encoding="utf-8") as file:
        for point in points:
            file.writelines(line + "\n" for line in point.evaluation.lines(frames=point.frames, max_tokens=point.max_tokens))
    table.write_text("".join(json.dumps(row) + "\n" for point in points for row in point.rows()), encoding="utf-8")
    return answers, table
