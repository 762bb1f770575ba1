"""The text-only baseline: the score of the best answer from the question alone.

The answer of a question is the most frequent training answer to the same text, else the most frequent training answer of all.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from eagle_train.data.facts import Facts
from eagle_train.data.sample import load_sample
from eagle_train.executors import BackgroundCall, WorkerError

from .metrics import Evaluation
from .scoring import final_answer

if TYPE_CHECKING:  # the process that counts needs no torch
    from eagle_train.distributed.world import World

logger = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"\s*<(?:image|video|document)(?:-\d+)?>\s*")


def question_text(content: str) -> str:
    """A user turn without its placeholders."""
    return _PLACEHOLDER.sub(" ", content).strip()


def last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last user turn, without placeholders."""
    return next((question_text(message["content"]) for message in reversed(messages) if message["role"] == "user"), "")


MOST_KEPT = 200_000
"""Different pairs of a question and an answer that are kept whatever is asked."""
IN_BACKGROUND_FROM = 20_000
"""Training rows that are worth a process: 43 632 took 7 s (two slow cores)."""


class TooManyAnswersError(Exception):
    """More than `MOST_KEPT` pairs, and nothing is said about which of them matter."""


class Frequencies(NamedTuple):
    """best: most frequent answer of each question text. overall: most frequent answer of all. complete: whether `best` has the questions
    of all training rows."""

    best: dict[str, str]
    overall: str
    complete: bool

    @classmethod
    def count(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pairs: Iterable[tuple[str, str]], questions: set[str] | None
    ) -> Frequencies:
        """From (question, answer) pairs; where there are more than `MOST_KEPT`, only the answers to `questions` are kept apart.

        Raises TooManyAnswersError where there are more and `questions` is None.
        """
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        every: Counter[str] = Counter()
        different, complete = 0, True
        for question, answer in pairs:
            every[answer] += 1
            if complete or question in (questions or ()):
                counter = counts[question]
                different += answer not in counter
                counter[answer] += 1
                if complete and different > MOST_KEPT:
                    if questions is None:
                        raise TooManyAnswersError
                    complete = False
                    counts = defaultdict(Counter, {text: counter for text, counter in counts.items() if text in questions})
        best = {question: counter.most_common(1)[0][0] for question, counter in counts.items()}
        return cls(best, every.most_common(1)[0][0] if every else "", complete)

    def answer(self, question: str) -> str:
        """The text-only answer."""
        return self.best.get(question, self.overall)


def count_answers(facts: Facts, answer_after: str | None, questions: set[str] | None = None) -> Frequencies:
    """Of all training rows; see `Frequencies.count`."""
    pairs = ((question, final_answer(text, answer_after)[1]) for question, text in training_pairs(facts))
    return Frequencies.count(pairs, questions)


class TextOnlyBaseline:
    """The baseline of a run. The training rows are read once, by the main rank, and again only for questions that are evaluated later and
    were not kept.

    answer_after: what stands before the answer in training answers with reasons (`eval.answer_after`).
    """

    def __init__(self, facts: Facts, answer_after: str | None = None) -> None:
        self.facts, self.answer_after = facts, answer_after
        self._known: set[str] = set()
        self._frequencies: Frequencies | None = None
        self._counting: BackgroundCall[Frequencies] | None = None

    def count_in_background(self) -> None:
        """Read the training rows in another process, where they are many; `fill` waits for it. For the main rank."""
        if len(self.facts) >= IN_BACKGROUND_FROM:
            self._counting = BackgroundCall(count_answers, self.facts.only_addresses(), self.answer_after)

    def fill(self, evaluation: Evaluation, world: World) -> Evaluation:
        """The evaluation with the baseline's answers on the main rank, unchanged on the others; a collective of all ranks."""
        return world.first(lambda: self._filled(evaluation)) or evaluation

    def _filled(self, evaluation: Evaluation) -> Evaluation:
        if self._counting is not None:
            try:
                self._frequencies = self._counting.result()
            except WorkerError as error:  # what fails there fails again below, and is reported
                logger.debug("the text-only baseline: %s", error)
            self._counting = None
        questions = {answer.question for answer in evaluation.answers}
        frequencies = self._frequencies
        if frequencies is None or not (frequencies.complete or questions <= self._known):
            self._known |= questions
            frequencies = self._frequencies = count_answers(self.facts, self.answer_after, self._known)
        return replace(
            evaluation, answers=tuple(answer._replace(text_only=frequencies.answer(answer.question)) for answer in evaluation.answers)
        )


def training_pairs(facts: Facts) -> Iterator[tuple[str, str]]:
    """(question, answer) of every assistant turn of the rows that is learned of the facts, the question as `evaluate` poses it."""
    for source in facts.sources:
        for address in facts.addresses(source):
            messages = load_sample(address).messages
            for index, message in enumerate(messages):
                if message["role"] == "assistant" and message.get("train", True):
                    yield last_question(messages[:index]), message["content"]
