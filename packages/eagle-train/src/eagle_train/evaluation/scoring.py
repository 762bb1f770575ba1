"""Metrics: functions of an answer, the expected answer and the question, with values from 0 to 1. `METRICS` is the table.

A metric that only needs these texts is one function and one row. The others are computed by a pass of their own: `teacher_forced` and
`likelihood` by `teacher_forced.py`, `judge` by `judge.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from .options import chosen, normalised, options_of

Metric = Callable[[str, str, str], float]
"""(given answer, expected answer, question) -> 0 ... 1."""

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_TIME = re.compile(r"(?<![\d:.])(?:(?:(\d+):)?(\d{1,2}):(\d{2}(?:\.\d+)?)|(\d+(?:\.\d+)?))(?![\d:])")
TOLERANCE = 0.05
"""Relative error of a right number: the relaxed accuracy of ChartQA (Masry et al., 2022)."""
ANLS_THRESHOLD = 0.5
"""Normalised edit distance from which an answer has the value 0 (Biten et al., 2019, Eq. 1)."""


def final_answer(text: str, marker: str | None) -> tuple[str, str]:
    """Reasons and answer of a text: split behind the last `marker`; without one all of it is the answer."""
    before, found, after = text.rpartition(marker) if marker is not None else ("", "", text)
    return before + found, after


def exact(given: str, expected: str, question: str = "") -> float:
    """1 when the texts are equal after lower-casing and removing outer punctuation and repeated spaces."""
    return float(normalised(given) == normalised(expected))


def contains(given: str, expected: str, question: str = "") -> float:
    """1 when the words of the expected answer occur in the given one, in a row."""
    words, wanted = _words(given), _words(expected)
    return float(bool(wanted) and any(words[start : start + len(wanted)] == wanted for start in range(len(words) - len(wanted) + 1)))


def choice(given: str, expected: str, question: str = "") -> float:
    """1 when both name the same option of the question, by letter or by text (see `options.chosen`)."""
    options = options_of(question)
    right = chosen(expected, options)
    return float(right is not None and chosen(given, options) == right)


def anls(given: str, expected: str, question: str = "") -> float:
    """Average normalised Levenshtein similarity of one answer: 1 - d / max(lengths), 0 from a normalised distance of 0.5 on."""
    a, b = normalised(given), normalised(expected)
    distance = _edit_distance(a, b) / max(len(a), len(b), 1)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def numeric(given: str, expected: str, question: str = "") -> float:
    """1 when the first numbers of both differ by at most 5 %; an expected answer without a number is compared exactly."""
    right = _NUMBER.search(expected)
    if right is None:
        return exact(given, expected)
    found = _NUMBER.search(given)
    if found is None:
        return 0.0
    a, b = (float(match[0].replace(",", "")) for match in (found, right))
    return float(abs(a - b) <= TOLERANCE * abs(b))


def temporal_iou(given: str, expected: str, question: str = "") -> float:
    """Intersection over union of the intervals that both name: their first two times, in seconds (`3.5`) or as `1:02:03`, `2:03`."""
    (a, b), (c, d) = _interval(given), _interval(expected)
    union = max(b, d) - min(a, c)
    return max(0.0, min(b, d) - max(a, c)) / union if union > 0 else 0.0


def f1(given: str, expected: str, question: str = "") -> float:
    """Harmonic mean of precision and recall of the words, as in SQuAD (Rajpurkar et al., 2016), articles not counted."""
    a, b = ([word for word in _words(text) if word not in ("a", "an", "the")] for text in (given, expected))
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else float(a == b)


METRICS: dict[str, Metric] = {
    "exact": exact,
    "choice": choice,
    "contains": contains,
    "anls": anls,
    "numeric": numeric,
    "temporal_iou": temporal_iou,
    "f1": f1,
}

TEXT_METRIC = {"likelihood": "choice", "teacher_forced": "exact"}
"""Which metric compares texts for the metrics that score tokens: for the answer of the text-only baseline."""


def value_of(metric: str, given: str, expected: str, question: str) -> float:
    """The value of a text under a metric, 0 ... 1. Raises KeyError for `judge`, which needs its endpoint."""
    return METRICS[TEXT_METRIC.get(metric, metric)](given, expected, question)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:[.,]\d+)*", text.casefold())


def _edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, a row at a time."""
    previous = list(range(len(b) + 1))
    for row, left in enumerate(a, 1):
        current = [row]
        for column, right in enumerate(b, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]


def _interval(text: str) -> tuple[float, float]:
    """The first two times of a text in order, (0, 0) when it has fewer."""
    times = [
        float(match[4]) if match[4] is not None else int(match[1] or 0) * 3600 + int(match[2]) * 60 + float(match[3])
        for match in _TIME.finditer(text)
    ]
    if len(times) < 2:
        return 0.0, 0.0
    return min(times[:2]), max(times[:2])
