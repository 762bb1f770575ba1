"""Answers to held-out questions by greedy decoding, compared word for word, beside the best answer that never looks.

A question is a held-out row: everything before its last assistant turn is the prompt, that turn is the right answer. A row that can't be
read or does not fit counts as a wrong answer, so that the number of questions never depends on what went wrong.
"""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from eagle_model.prompt import IM_END, PromptError
from eagle_sampling import Limits, MediaError
from eagle_train.config import Config
from eagle_train.data.encoding import CachedEncoder
from eagle_train.data.facts import Facts
from eagle_train.data.sample import RowError, Sample, normalise, parse_row
from eagle_train.planning.visual import ModelFacts, SamplePlan, VisualColumns, plan_visual, sample_plan

from .batch import Address, address_of, load_sample, tokenise
from .parallel import World, is_sharded
from .pixels import MaterialiseError, read_tiles

_PLACEHOLDER = re.compile(r"\s*<(?:image|video|document)(?:-\d+)?>\s*")


class Answer(NamedTuple):
    """One question with the model's answer, the right one, and the blind one; `problem` says why there is no answer."""

    source: str
    line: int
    question: str
    expected: str
    given: str
    blind: str
    problem: str = ""

    @property
    def right(self) -> bool:
        return not self.problem and normalised(self.given) == normalised(self.expected)

    @property
    def blind_right(self) -> bool:
        return normalised(self.blind) == normalised(self.expected)


class EvaluationError(RuntimeError):
    """The model can't answer, on at least one rank; raised on every rank with the same message."""


class Score(NamedTuple):
    """Share of right answers, of the model and blind."""

    questions: int
    accuracy: float
    blind: float


@dataclass(frozen=True)
class Evaluation:
    """All answers, in the order of the rows."""

    answers: tuple[Answer, ...]
    seconds: float

    def score(self, choose: Callable[[Answer], bool] = lambda answer: True) -> Score:
        """Score of the answers that `choose` takes."""
        chosen = [answer for answer in self.answers if choose(answer)]
        count = max(len(chosen), 1)
        return Score(len(chosen), sum(a.right for a in chosen) / count, sum(a.blind_right for a in chosen) / count)

    def by_source(self) -> dict[str, Score]:
        """Scores by source, in the order of the recipe."""
        names = dict.fromkeys(answer.source for answer in self.answers)
        return {name: self.score(lambda answer, name=name: answer.source == name) for name in names}


def describe(error: BaseException) -> str:
    """Kind and message of an error, and the last line of code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def normalised(text: str) -> str:
    """Case, outer punctuation and spacing don't make an answer wrong."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def question_text(content: str) -> str:
    """A user turn without its placeholders."""
    return _PLACEHOLDER.sub(" ", content).strip()


def last_question(messages: Sequence[dict[str, str]]) -> str:
    """What the user said last, without placeholders."""
    return next((question_text(message["content"]) for message in reversed(messages) if message["role"] == "user"), "")


class Blind:
    """The best answers without looking: the most frequent training answer of each question text, else of all questions."""

    def __init__(self, pairs: Iterator[tuple[str, str]]) -> None:
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        every: Counter[str] = Counter()
        for question, answer in pairs:
            counts[question][answer] += 1
            every[answer] += 1
        self._best = {question: counter.most_common(1)[0][0] for question, counter in counts.items()}
        self._any = every.most_common(1)[0][0] if every else ""

    def answer(self, question: str) -> str:
        """The blind answer."""
        return self._best.get(question, self._any)


def training_pairs(facts: Facts) -> Iterator[tuple[str, str]]:
    """(question, answer) of every assistant turn of the rows of the facts, the question as `evaluate` asks it."""
    columns = [facts.column(name) for name in ("line", "offset", "size")]
    for source in facts.sources:
        with open(source.annotation, "rb") as file:
            rows = slice(source.first, source.first + source.rows)
            for line, offset, size in zip(*(column[rows].tolist() for column in columns)):
                file.seek(offset)
                sample = normalise(parse_row(file.read(size)), source.name, root=source.root, line=line, system=facts.system)
                for index, message in enumerate(sample.messages):
                    if message["role"] == "assistant":
                        yield last_question(sample.messages[:index]), message["content"]


class _Question(NamedTuple):
    row: int
    address: Address
    plan: SamplePlan | None
    problem: str


class _Ready(NamedTuple):
    question: _Question
    prompt: Sample | None
    expected: str
    input_ids: np.ndarray
    tiles: np.ndarray
    problem: str


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    config: Config,
    world: World,
    described: ModelFacts,
    *,
    blind: Blind,
    limit: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate every held-out row (the first `limit` of each source); every rank calls it and gets all answers.

    max_tokens: the budget of a sample; None takes the last stage's. progress: called on every rank after each of the same number of
    rounds with (answered here, to answer here). Raises EvaluationError on every rank when one of them fails, and RankError on that rank
    when it fails in the middle of a collective of a sharded model.
    """
    begin = time.monotonic()
    budget = max_tokens or config.stages[-1].max_tokens
    visual = plan_visual(facts, budget, described, sampling=config.sampling, tiling=config.tiling)
    rows = [row for s in facts.sources for row in range(s.first, s.first + (s.rows if limit is None else min(s.rows, limit)))]
    # Questions of about the same length go together, so that little is padded; ranks take turns.
    order = sorted(rows, key=lambda row: (int(visual.tokens[row]), row))
    size = config.eval.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    reader = _Reader(facts, visual, config, described, tokenizer)
    answers: dict[int, Answer] = {}
    failure: str | None = None
    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(reader.read, mine[0] if mine else [])
        for number in range(rounds):
            ready: list[_Ready] = []
            try:
                ready = waiting.result() if failure is None else []
            except Exception as error:
                failure = describe(error)
            waiting = ahead.submit(reader.read, mine[number + 1] if failure is None and number + 1 < len(mine) else [])
            try:
                # Also after a failure to read: ranks of a sharded model generate together.
                texts = _generate(model, tokenizer, ready, config, world, described)
            except Exception as error:
                failure = failure or describe(error)
                if is_sharded(model):
                    break
                texts = [""] * len(ready)
            for item, given in zip(ready, texts):
                address = item.question.address
                asked = last_question(item.prompt.messages) if item.prompt else ""
                answers[item.question.row] = Answer(
                    address.source, address.line, asked, item.expected, given, blind.answer(asked), item.problem
                )
            if progress is not None:
                progress(len(answers), sum(map(len, mine)))
    if failures := world.failures(failure):
        raise EvaluationError("; ".join(failures))
    merged: dict[int, Answer] = {}
    for part in world.gather(answers):
        merged |= {row: Answer(*answer) for row, answer in part.items()}
    return Evaluation(tuple(merged[row] for row in rows), time.monotonic() - begin)


class _Reader:
    """Reads the prompts and tiles of some rows."""

    def __init__(self, facts: Facts, visual: VisualColumns, config: Config, described: ModelFacts, tokenizer: Any) -> None:
        self.facts, self.visual, self.config, self.described = facts, visual, config, described
        self.encoder = CachedEncoder(tokenizer)
        limits = config.data.limits
        self.limits = Limits(max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, max_frames=limits.max_frames)

    def read(self, rows: Sequence[int]) -> list[_Ready]:
        return [self._read(row) for row in rows]

    def _read(self, row: int) -> _Ready:
        address = address_of(self.facts, row)
        nothing = np.zeros(0, np.int64), np.zeros((0, self.described.tile_size, self.described.tile_size, 3), np.uint8)
        try:
            sample = load_sample(address)
        except (RowError, OSError) as error:
            return _Ready(_Question(row, address, None, str(error)), None, "", *nothing, str(error))
        last = max(index for index, message in enumerate(sample.messages) if message["role"] == "assistant")
        prompt = replace(sample, messages=sample.messages[:last])
        expected = sample.messages[last]["content"]
        if self.visual.status[row] != 0:
            problem = self.visual.reasons[self.visual.status[row]]
            return _Ready(_Question(row, address, None, problem), prompt, expected, *nothing, problem)
        plan = sample_plan(self.facts, self.visual, row, self.described, sampling=self.config.sampling, tiling=self.config.tiling)
        question = _Question(row, address, plan, "")
        thumbnail = self.config.tiling.thumbnail
        try:
            ids = tokenise(prompt, plan, self.encoder, self.described.tokens_per_tile, thumbnail=thumbnail, generation=True).input_ids
            tiles = read_tiles(prompt, plan, self.described, thumbnail=thumbnail, limits=self.limits)
        except (MaterialiseError, MediaError, PromptError, OSError) as error:
            return _Ready(question, prompt, expected, *nothing, str(error))
        return _Ready(question, prompt, expected, ids, tiles, "")


def _generate(model: nn.Module, tokenizer: Any, ready: Sequence[_Ready], config: Config, world: World, described: ModelFacts) -> list[str]:
    """Greedy answers; sharded models run on every rank, with a prompt of one token where a rank has nothing to ask."""
    asked = [item for item in ready if len(item.input_ids)]
    sharded = is_sharded(model) and world.size > 1
    if not asked and not sharded:
        return [""] * len(ready)
    end = int(tokenizer.convert_tokens_to_ids(IM_END))
    prompts = [item.input_ids for item in asked] or [np.array([end], np.int64)]
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), end)
    mask = torch.zeros((len(prompts), length), dtype=torch.int64)
    for place, prompt in enumerate(prompts):
        ids[place, length - len(prompt) :] = torch.from_numpy(prompt)
        mask[place, length - len(prompt) :] = 1
    side = described.tile_size
    tiles = np.concatenate([item.tiles for item in asked]) if asked else np.zeros((0, side, side, 3), np.uint8)
    device = world.device
    with torch.inference_mode():
        made = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=torch.from_numpy(tiles).to(device) if len(tiles) or sharded else None,
            max_new_tokens=config.eval.max_new_tokens,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
            synced_gpus=sharded,
        )
    texts = iter(tokenizer.batch_decode(made[:, length:].cpu(), skip_special_tokens=True) if asked else [])
    return [next(texts).strip() if len(item.input_ids) else "" for item in ready]
