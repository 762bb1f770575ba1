"""Step 5, check: pairs that would teach the wrong thing are removed, each with its reason; what is left becomes a recipe.

Reasons: `length`, `language`, `duplicate`, `anchor-outside`, `anchor-leaks`, `text-only` (answered without frames), and those of requests
without an answer.
"""

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from eagle_train.data.atomic import replacing

from .answers import NoAnswer
from .endpoint import Account, Endpoint, Request, Schema
from .folder import Folder, entry, nothing
from .settings import CheckConfig, CurateConfig

SYSTEM = "You check training data. Answer as JSON of the given schema."
GUESS = "Nobody shows you the video. Answer this question about it from the text alone, as well as you can: {question}"
SAME = "Question: {question}\nReference answer: {answer}\nOther answer: {other}\nDo both answers say the same?"
LEAK = "Question: {question}\nAnswer: {answer}\nHint in front of the question: {anchor}\nDoes the hint give the answer away?"
DURATIONS = (10.0, 30.0, 60.0, 180.0)
"""Edges in seconds of the report's table of durations."""


class Guess(Schema):
    """The answer of the model that sees no frames."""

    answer: str


class Same(Schema):
    """Whether two answers say the same."""

    same: bool


class Leak(Schema):
    """Whether an anchor gives the answer away."""

    leaks: bool


@dataclass(frozen=True)
class Report:
    """rows: kept; removed: by reason; mixture: numbers of kept rows by source, duration and type; account: of the requests."""

    rows: int
    removed: Counter[str]
    mixture: dict[str, Counter[str]]
    account: Account


def check(config: CurateConfig, *, progress: Callable[[int, int], None] | None = None) -> Report:
    """Check `annotate.parquet`, write what is left as `check.parquet`, `samples.jsonl` and `recipe.yaml`."""
    folder = Folder(config.folder)
    table = folder.read("annotate")
    if not table.num_rows:
        raise nothing("check", "annotate", folder.ledger.path)
    settings = config.check
    rows = table.to_pylist()
    problems: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        if (problem := text_problem(row, settings) or anchor_problem(row)) is not None:
            problems[number] = problem
    for number, other in duplicates([row for row in rows], settings.duplicate, set(problems)).items():
        problems[number] = ("duplicate", f"asks what {rows[other]['id']} asks: {rows[other]['question']}")
    account = Account()
    if settings.text_only or settings.anchor_model:
        endpoint = Endpoint(config.annotate.endpoint, folder.path / "answers.jsonl")
        left = [number for number in range(len(rows)) if number not in problems]
        found = endpoint.map(lambda number: model_problem(rows[number], settings, endpoint), left, progress)
        problems |= {number: problem for number, problem in zip(left, found) if problem is not None}
        account = endpoint.account
    kept = [number for number in range(len(rows)) if number not in problems]
    entries = [
        entry("check", rows[number]["video"], number + 1, reason, f"{rows[number]['question'][:200]}: {detail}")
        for number, (reason, detail) in sorted(problems.items())
    ]
    result = table.take(pa.array(kept, pa.int64()))
    folder.replace("check", result, entries)
    write_recipe(folder, result.to_pylist())
    removed = Counter(reason for reason, _ in problems.values())
    return Report(len(kept), removed, mixture([rows[number] for number in kept]), account)


def text_problem(row: dict[str, Any], settings: CheckConfig) -> tuple[str, str] | None:
    """(reason, detail) when question or answer has a bad length or script."""
    for what, shortest, longest in (
        ("question", settings.min_question, settings.max_question),
        ("answer", settings.min_answer, settings.max_answer),
    ):
        length = len(row[what].strip())
        if not shortest <= length <= longest:
            return "length", f"the {what} has {length} characters, check.min_{what} and max_{what} allow {shortest} to {longest}"
        if settings.script is not None and (share := script_share(row[what], settings.script)) < 0.5:
            return "language", f"{share:.0%} of the {what}'s letters are {settings.script}"
    return None


def script_share(text: str, script: str) -> float:
    """Share of the letters that belong to a script, by their Unicode names; 1 without letters."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return 1.0
    return sum(unicodedata.name(letter, "").startswith(script.upper()) for letter in letters) / len(letters)


def anchor_problem(row: dict[str, Any]) -> tuple[str, str] | None:
    """(reason, detail) when an anchor names times outside of its clip, or contains the answer."""
    anchor = row["anchor"]
    if anchor is None:
        return None
    if row["mode"] == "time":
        start, end = (float(text) for text in re.findall(r"\d+(?:\.\d+)?", anchor)[:2])
        if start < row["start"] - 0.06 or end > row["end"] + 0.06 or start >= end:
            return "anchor-outside", f"{anchor!r} is not inside {row['start']:.2f}-{row['end']:.2f} s"
        return None
    if leaks(anchor, row["bare_question"], row["answer"]):
        return "anchor-leaks", f"{anchor!r} contains the answer {row['answer']!r}"
    return None


def leaks(anchor: str, question: str, answer: str) -> bool:
    """Whether the anchor has every word of the answer that is not in the question."""
    new = [name for name in words(answer) if name not in set(words(question)) and name not in _SMALL]
    return bool(new) and set(new) <= set(words(anchor))


_SMALL = frozenset(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "it",
        "its",
        "he",
        "she",
        "they",
        "his",
        "her",
        "their",
        "of",
        "in",
        "on",
        "at",
        "to",
        "and",
        "or",
        "with",
        "for",
        "from",
        "by",
        "as",
        "that",
        "this",
    ]
)


def words(text: str) -> list[str]:
    """Words in lower case; each character of scripts without spaces is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+", text.casefold())


def duplicates(rows: list[dict[str, Any]], threshold: float, out: set[int]) -> dict[int, int]:
    """{row: earlier row of the same video, span and mode that asks the same}; rows `out` are not compared.

    Two questions ask the same when their words overlap (Jaccard) by `threshold` and their answers are equal.
    """
    groups: dict[Any, list[tuple[int, frozenset[str], list[str]]]] = {}
    found: dict[int, int] = {}
    for number, row in enumerate(rows):
        if number in out:
            continue
        asked, answer = frozenset(words(row["question"])), words(row["answer"])
        kept = groups.setdefault((row["content"], row["mode"], None if row["whole"] else row["clip"]), [])
        for other, others, its_answer in kept:
            if answer == its_answer and len(asked & others) >= threshold * max(len(asked | others), 1):
                found[number] = other
                break
        else:
            kept.append((number, asked, answer))
    return found


def model_problem(row: dict[str, Any], settings: CheckConfig, endpoint: Endpoint) -> tuple[str, str] | None:
    """(reason, detail) when the model answers without frames, or finds that the context anchor gives the answer away."""
    question, answer = row["question"], row["answer"]
    try:
        if settings.anchor_model and row["mode"] == "context":
            prompt = LEAK.format(question=row["bare_question"], answer=answer, anchor=row["anchor"])
            if endpoint.ask(Request("leak", SYSTEM, prompt, None, Leak)).leaks:
                return "anchor-leaks", f"the model says that {row['anchor']!r} gives the answer away"
        if settings.text_only:
            guess = _guess(endpoint, question)
            if words(guess) == words(answer):
                return "text-only", f"answered without frames: {guess[:100]!r}"
            if words(guess):
                prompt = SAME.format(question=question, answer=answer, other=guess)
                if endpoint.ask(Request("same", SYSTEM, prompt, None, Same)).same:
                    return "text-only", f"answered without frames: {guess[:100]!r}"
    except NoAnswer as problem:
        return problem.reason, problem.detail
    return None


def _guess(endpoint: Endpoint, question: str) -> str:
    """The model's answer without frames; empty when it refuses, which many do because they see no video."""
    try:
        return endpoint.ask(Request("guess", SYSTEM, GUESS.format(question=question), None, Guess)).answer
    except NoAnswer as problem:
        if problem.reason == "refused":
            return ""
        raise


def mixture(rows: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Numbers of rows by source, by duration of what they show, and by type."""
    edges = [0.0, *DURATIONS]
    names = [f"{low:g}-{high:g} s" for low, high in itertools.pairwise(edges)] + [f"over {edges[-1]:g} s"]
    return {
        "source": Counter(row["source"] for row in rows),
        "duration": Counter(names[sum(row["seconds"] >= edge for edge in DURATIONS)] for row in rows),
        "type": Counter(row["type"] for row in rows),
        "mode": Counter(row["mode"] for row in rows),
    }


def write_recipe(folder: Folder, rows: list[dict[str, Any]]) -> None:
    """`samples.jsonl` and `recipe.yaml`, which `eagle train` takes as data.recipe."""
    with replacing(folder.path / "samples.jsonl") as file:
        for row in rows:
            file.write(json.dumps(sample_of(row), ensure_ascii=False).encode() + b"\n")
    with replacing(folder.path / "recipe.yaml") as file:
        file.write(b"sources:\n  curated:\n    annotation: samples.jsonl\n")


def sample_of(row: dict[str, Any]) -> dict[str, Any]:
    """A pair as a row of an annotation file."""
    video: Any = row["video"] if row["whole"] else {"path": row["video"], "start": row["start"], "end": row["end"]}
    turns = [{"from": "human", "value": f"<video>{row['question']}"}, {"from": "gpt", "value": row["answer"]}]
    return {"id": row["id"], "video": video, "conversations": turns}
