"""Answers and scores: exact match after normalisation, next to the text-only baseline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Answer(NamedTuple):
    """One question with the model's answer, the expected one, and that of the text-only baseline; `problem`: why there is no answer."""

    source: str
    line: int
    question: str
    expected: str
    given: str
    text_only: str = ""
    problem: str = ""

    @property
    def right(self) -> bool:
        return not self.problem and normalised(self.given) == normalised(self.expected)

    @property
    def text_only_right(self) -> bool:
        return normalised(self.text_only) == normalised(self.expected)


class Score(NamedTuple):
    """Share of right answers, of the model and of the text-only baseline."""

    questions: int
    accuracy: float
    text_only: float


@dataclass(frozen=True)
class Evaluation:
    """All answers, in the order of the rows."""

    answers: tuple[Answer, ...]
    seconds: float

    def score(self, choose: Callable[[Answer], bool] = lambda answer: True) -> Score:
        """Score of the answers for which `choose` is true."""
        return score_of([answer for answer in self.answers if choose(answer)])

    def by_source(self) -> dict[str, Score]:
        """Scores by source, in the order of the recipe."""
        groups: dict[str, list[Answer]] = {}
        for answer in self.answers:
            groups.setdefault(answer.source, []).append(answer)
        return {name: score_of(answers) for name, answers in groups.items()}

    def write(self, path: Path) -> Path:
        """Write one line per question (JSONL): the fields of `Answer` and `right`; returns the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for answer in self.answers:
                file.write(json.dumps(answer._asdict() | {"right": answer.right}) + "\n")
        return path


def score_of(answers: Iterable[Answer]) -> Score:
    """Number of answers and the shares that are right."""
    answers = list(answers)
    count = max(len(answers), 1)
    return Score(len(answers), sum(a.right for a in answers) / count, sum(a.text_only_right for a in answers) / count)


def normalised(text: str) -> str:
    """The text without differences that don't make an answer wrong: case, outer punctuation and spacing."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")
