"""Answers, their values under a metric, and scores of sources next to the text-only baseline and with confidence intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .intervals import clustered_interval
from .options import options_of
from .scoring import value_of


class Answer(NamedTuple):
    """One question with the model's answer, the expected one, and that of the text-only baseline; `problem`: why there is no answer.

    reasons: what the model wrote before the answer (`eval.answer_after`). medium: the first image, video or document of the row, for
    clustered intervals; rows without media: the row. metric: a name of `eval.metrics`. value, text_only_value: 0 ... 1 as computed by a
    metric that does not only compare texts, else None.
    """

    source: str
    line: int
    question: str
    expected: str
    given: str
    text_only: str = ""
    problem: str = ""
    medium: str = ""
    metric: str = "exact"
    value: float | None = None
    text_only_value: float | None = None
    reasons: str = ""

    @property
    def score(self) -> float:
        """0 ... 1 under the metric; 0 when there is no answer."""
        if self.problem:
            return 0.0
        return self.value if self.value is not None else value_of(self.metric, self.given, self.expected, self.question)

    @property
    def text_only_score(self) -> float:
        """That of the text-only baseline's answer."""
        if self.text_only_value is not None:
            return self.text_only_value
        return value_of(self.metric, self.text_only, self.expected, self.question)

    @property
    def right(self) -> bool:
        """Whether the score is 1."""
        return self.score >= 1

    @property
    def cluster(self) -> Hashable:
        """Answers about the same medium are not independent."""
        return self.medium or (self.source, self.line)

    @property
    def group(self) -> Hashable:
        """Answers with the same group are one question: multiple choice with the same options of the same medium in another order."""
        options = options_of(self.question) if self.metric in ("choice", "likelihood") else None
        return (self.source, self.line) if options is None else (self.source, self.cluster, *options.key)


class Score(NamedTuple):
    """Mean score of the questions (accuracy: with a metric that is 0 or 1), of the model and of the text-only baseline.

    low, high: 95 % confidence interval of `accuracy`, clustered by medium.
    """

    questions: int
    accuracy: float
    text_only: float
    low: float
    high: float


class SourceLoss(NamedTuple):
    """Validation loss of a source. loss: mean negative log-likelihood of a label token in nats, over all assistant turns of the rows.

    token_accuracy: share of label tokens that are the most likely one. turns_right: share of turns in which all are. tokens, turns, rows:
    how many were scored.
    """

    loss: float
    token_accuracy: float
    turns_right: float
    tokens: int
    turns: int
    rows: int


@dataclass(frozen=True)
class Evaluation:
    """All answers, in the order of the rows; validation losses by source (empty with `eval.loss: false`)."""

    answers: tuple[Answer, ...]
    seconds: float
    losses: Mapping[str, SourceLoss] = field(default_factory=dict)

    def score(self, choose: Callable[[Answer], bool] = lambda answer: True) -> Score:
        """Score of the answers for which `choose` is true."""
        return score_of([answer for answer in self.answers if choose(answer)])

    def by_source(self) -> dict[str, Score]:
        """Scores by source, in the order of the recipe."""
        groups: dict[str, list[Answer]] = {}
        for answer in self.answers:
            groups.setdefault(answer.source, []).append(answer)
        return {name: score_of(answers) for name, answers in groups.items()}

    def record(self) -> dict[str, Any]:
        """Scores and losses as they stand in `metrics.jsonl`."""
        return {
            "scores": {name: score._asdict() for name, score in self.by_source().items()},
            "losses": {name: loss._asdict() for name, loss in self.losses.items()},
            "accuracy": self.score().accuracy,
        }

    def write(self, path: Path, **more: Any) -> Path:
        """Append one line per question (JSONL) to a new file: the fields of `Answer`, `score`, `right`, and `more`; returns the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self.lines(**more))
        return path

    def lines(self, **more: Any) -> Iterable[str]:
        """The lines of `write`."""
        for answer in self.answers:
            fields = {name: value for name, value in answer._asdict().items() if value is not None}
            yield json.dumps(fields | {"score": answer.score, "right": answer.right} | more)


def score_of(answers: Iterable[Answer]) -> Score:
    """Score of some answers; rotations of a question count once, with the lowest score of them."""
    groups: dict[Hashable, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.group, []).append(answer)
    values = [min(answer.score for answer in some) for some in groups.values()]
    text_only = [min(answer.text_only_score for answer in some) for some in groups.values()]
    count = max(len(values), 1)
    low, high = clustered_interval(values, [some[0].cluster for some in groups.values()])
    return Score(len(values), sum(values) / count, sum(text_only) / count, low, high)
