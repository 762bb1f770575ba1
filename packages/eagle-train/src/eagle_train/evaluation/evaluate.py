"""Evaluation of a model on held-out rows by greedy decoding.

A question is a held-out row: everything before its last assistant turn that is learned is the prompt, that turn is the expected answer. A
row that can't be read or does not fit counts as a wrong answer, so that the number of questions doesn't depend on what fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from eagle_model.prompt import CachedEncoder, PromptError, encode
from eagle_model.visual import MediaChanged, VisualPlans, VisualSpec, read_tiles
from eagle_sampling import MediaError
from eagle_train.config import Config
from eagle_train.data.facts import Facts
from eagle_train.data.measure import media_limits
from eagle_train.data.sample import Address, RowError, load_sample
from eagle_train.distributed.sharding import is_sharded
from eagle_train.distributed.world import World
from eagle_train.errors import EvaluationError, describe
from eagle_train.planning.visual import plan_visual, sample_plan

from .generate import generate
from .metrics import Answer, Evaluation
from .text_only import last_question


class Question(NamedTuple):
    """A held-out row, ready for the model. text: the last user turn. problem: why the row has no prompt, or empty."""

    row: int
    address: Address
    text: str = ""
    expected: str = ""
    input_ids: np.ndarray | None = None
    tiles: np.ndarray | None = None
    problem: str = ""


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    config: Config,
    world: World,
    spec: VisualSpec,
    *,
    limit: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate every held-out row (the first `limit` of each source); every rank calls it and gets all answers.

    max_tokens: the budget of a sample; default: that of the last stage. progress: called on every rank after each of the same number of
    rounds with (rows answered by this rank, rows of this rank). Raises EvaluationError on every rank when one of them fails, and RankError
    on that rank when it fails in the middle of a collective of a sharded model.
    """
    begin = time.monotonic()
    plans = plan_visual(facts, max_tokens or config.stages[-1].max_tokens, spec)
    rows = [row for s in facts.sources for row in range(s.first, s.first + (s.rows if limit is None else min(s.rows, limit)))]
    # Questions of about the same length go together, so that little is padded; ranks take turns.
    order = sorted(rows, key=lambda row: (int(plans.tokens[row]), row))
    size = config.eval.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    reader = _Reader(facts, plans, config, spec, tokenizer)
    answers: dict[int, Answer] = {}
    failure: str | None = None
    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(reader.read, mine[0] if mine else [])
        for number in range(rounds):
            questions: list[Question] = []
            try:
                questions = waiting.result() if failure is None else []
            except Exception as error:
                failure = describe(error)
            waiting = ahead.submit(reader.read, mine[number + 1] if failure is None and number + 1 < len(mine) else [])
            try:
                # Also after a failure to read: ranks of a sharded model generate together.
                texts = _answer(model, tokenizer, questions, config, world, spec)
            except Exception as error:
                failure = failure or describe(error)
                if is_sharded(model):
                    break
                texts = [""] * len(questions)
            for question, given in zip(questions, texts):
                address = question.address
                answers[question.row] = Answer(
                    address.source, address.line, question.text, question.expected, given, problem=question.problem
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

    def __init__(self, facts: Facts, plans: VisualPlans, config: Config, spec: VisualSpec, tokenizer: Any) -> None:
        self.facts, self.plans, self.spec = facts, plans, spec
        self.encoder = CachedEncoder(tokenizer)
        self.limits = media_limits(config.data.limits)

    def read(self, rows: Sequence[int]) -> list[Question]:
        return [self._read(row) for row in rows]

    def _read(self, row: int) -> Question:
        question = Question(row, self.facts.address(row))
        try:
            sample = load_sample(question.address)
        except (RowError, OSError) as error:
            return question._replace(problem=str(error))
        last = max(index for index, message in enumerate(sample.messages) if message["role"] == "assistant" and message.get("train", True))
        prompt = replace(sample, messages=sample.messages[:last])
        question = question._replace(text=last_question(prompt.messages), expected=sample.messages[last]["content"])
        if self.plans.status[row] != 0:
            return question._replace(problem=self.plans.reasons[self.plans.status[row]])
        plan = sample_plan(self.facts, self.plans, row, self.spec)
        try:
            ids = encode(plan.render(prompt.messages, self.spec, add_generation_prompt=True), self.encoder).input_ids
            tiles = read_tiles(prompt.messages, prompt.images, prompt.videos, plan, self.spec, limits=self.limits)
        except (MediaChanged, MediaError, PromptError, OSError) as error:
            return question._replace(problem=str(error))
        return question._replace(input_ids=ids, tiles=tiles)


def _answer(model: nn.Module, tokenizer: Any, questions: Sequence[Question], config: Config, world: World, spec: VisualSpec) -> list[str]:
    """Answers to the questions that have a prompt, nothing for the others."""
    prompts = [question.input_ids for question in questions if question.input_ids is not None]
    tiles = [question.tiles for question in questions if question.tiles is not None]
    pixels = np.concatenate(tiles) if tiles else np.zeros((0, spec.tile_size, spec.tile_size, 3), np.uint8)
    together = is_sharded(model) and world.size > 1
    made = generate(model, tokenizer, prompts, pixels, max_new_tokens=config.eval.max_new_tokens, device=world.device, together=together)
    texts = iter(made)
    return ["" if question.input_ids is None else next(texts) for question in questions]
