"""Evaluation of a model on held-out rows: answers by greedy decoding or by teacher-forced scoring, and validation losses.

A question is a held-out row: everything before its last assistant turn that is learned is the prompt, that turn is the expected answer. A
row that can't be read or does not fit counts as a wrong answer, so that the number of questions doesn't depend on what fails. The
validation loss covers all assistant turns that are learned, of the rows that can be read and fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from eagle_model.prompt import CachedEncoder, PromptError, encode
from eagle_model.visual import MediaChanged, VisualPlans, VisualSpec, read_tiles
from eagle_sampling import MediaError
from eagle_train.config import Config, ConfigError
from eagle_train.data.facts import Facts
from eagle_train.data.measure import media_limits
from eagle_train.data.sample import Address, RowError, load_sample
from eagle_train.distributed.sharding import is_sharded
from eagle_train.distributed.world import World
from eagle_train.errors import EvaluationError, describe
from eagle_train.planning.visual import plan_visual, sample_plan

from .generate import generate
from .metrics import Answer, Evaluation, SourceLoss
from .options import options_of, rephrased
from .scoring import TEXT_METRIC, final_answer
from .teacher_forced import Scores, TurnScore, Variant, last_answer, score_variants
from .text_only import last_question

SCORED = tuple(TEXT_METRIC)
"""Metrics of teacher-forced scoring, which need no generated answer."""


class Question(NamedTuple):
    """A held-out row, ready for the model. text: the last user turn. problem: why the row has no prompt, or empty."""

    row: int
    address: Address
    text: str = ""
    expected: str = ""
    input_ids: np.ndarray | None = None
    tiles: np.ndarray | None = None
    problem: str = ""
    medium: str = ""
    generates: bool = True


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    config: Config,
    world: World,
    spec: VisualSpec,
    *,
    limit: int | None = None,
    sources: Collection[str] | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Evaluate every held-out row (the first `limit` of each source); every rank calls it and gets all answers.

    sources: names of those that are evaluated; default: all. max_tokens: the budget of a sample; default: that of the last stage.
    progress: called on every rank after each of the same number of rounds with (rows that this rank is done with, rows of this rank,
    "answered" or "scored"), first for answers, then for scores. Raises EvaluationError on every rank
    when one of them fails, and RankError on that rank when it fails in the middle of a collective of a sharded model.
    """
    begin = time.monotonic()
    check_metrics(config, facts)
    max_tokens = max_tokens or config.stages[-1].max_tokens
    plans = plan_visual(facts, max_tokens, spec)
    chosen = [source for source in facts.sources if sources is None or source.name in sources]
    rows = [row for s in chosen for row in range(s.first, s.first + (s.rows if limit is None else min(s.rows, limit)))]
    metrics = {row: config.eval.metrics.get(facts.source_of(row).name, "exact") for row in rows}
    answers = answer_rows(model, tokenizer, facts, plans, rows, metrics, config, world, spec, progress=progress)
    score = partial(
        score_variants, model, tokenizer, facts, plans, config=config, world=world, spec=spec, capacity=max_tokens, progress=progress
    )
    forced = [Variant(row) for row in rows if config.eval.loss or metrics[row] == "teacher_forced"]
    turns = score(variants=forced) if forced else {}
    for row in rows:
        if metrics[row] == "teacher_forced":
            answers[row] = _judged_by_tokens(answers[row], turns.get(Variant(row)))
    choices = {row: _options(answers[row]) for row in rows if metrics[row] == "likelihood" and not answers[row].problem}
    if choices:
        options = score(variants=[Variant(row, text) for row, texts in choices.items() for text in texts])
        for row, texts in choices.items():
            answers[row] = _most_likely(answers[row], texts, [options.get(Variant(row, text)) for text in texts])
    losses = source_losses(facts, rows, turns) if config.eval.loss else {}
    return Evaluation(tuple(answers[row] for row in rows), time.monotonic() - begin, losses)


def check_metrics(config: Config, facts: Facts) -> None:
    """Raises ConfigError for a metric of a source that is not held out, and for judge without a server."""
    names = [source.name for source in facts.sources]
    if unknown := [name for name in config.eval.metrics if name not in names]:
        raise ConfigError(f"eval.metrics names {', '.join(unknown)}, but the held-out sources are {', '.join(names)}")
    if "judge" in config.eval.metrics.values() and config.eval.judge is None:
        raise ConfigError("eval.metrics uses judge, but eval.judge has no server: set eval.judge.base_url and eval.judge.model")


def answer_rows(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    plans: VisualPlans,
    rows: Sequence[int],
    metrics: Mapping[int, str],
    config: Config,
    world: World,
    spec: VisualSpec,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[int, Answer]:
    """Answers of all ranks by row, on every rank. Rows whose metric needs no generated answer get an empty one, and read no media."""
    # Questions of about the same length go together, so that little is padded; ranks take turns.
    order = sorted(rows, key=lambda row: (int(plans.tokens[row]), row))
    size = config.eval.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    generates = any(metrics[row] not in SCORED for row in rows)
    reader = _Reader(facts, plans, metrics, config, spec, tokenizer)
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
                generated = [one for one in questions if one.generates]
                texts = _answer(model, tokenizer, generated, config, world, spec) if generates else []
            except Exception as error:
                failure = failure or describe(error)
                if is_sharded(model):
                    break
                texts = [""] * len(questions)
            given = iter(texts)
            for question in questions:
                reasons, answer = final_answer(next(given) if question.generates else "", config.eval.answer_after)
                answers[question.row] = Answer(
                    question.address.source,
                    question.address.line,
                    question.text,
                    question.expected,
                    answer,
                    reasons=reasons,
                    problem=question.problem,
                    medium=question.medium,
                    metric=metrics[question.row],
                )
            if progress is not None:
                progress(len(answers), sum(map(len, mine)), "answered")
    if failures := world.failures(failure):
        raise EvaluationError("; ".join(failures))
    merged: dict[int, Answer] = {}
    for part in world.gather(answers):
        merged |= {row: Answer(*answer) for row, answer in part.items()}
    return merged


def source_losses(facts: Facts, rows: Sequence[int], turns: Scores) -> dict[str, SourceLoss]:
    """Validation losses by source, of the rows that were scored; a source without any is missing."""
    by_source: dict[str, list[Sequence[TurnScore]]] = {}
    for row in rows:
        if (scored := turns.get(Variant(row))) is not None:
            by_source.setdefault(facts.source_of(row).name, []).append(scored)
    losses = {}
    for name, of_rows in by_source.items():
        every = [turn for scored in of_rows for turn in scored]
        tokens = sum(turn.tokens for turn in every)
        if tokens:
            losses[name] = SourceLoss(
                loss=math.fsum(turn.loss for turn in every) / tokens,
                token_accuracy=sum(turn.right for turn in every) / tokens,
                turns_right=sum(turn.right == turn.tokens for turn in every) / len(every),
                tokens=tokens,
                turns=len(every),
                rows=len(of_rows),
            )
    return losses


def _judged_by_tokens(answer: Answer, turns: Sequence[TurnScore] | None) -> Answer:
    """With the value 1 when every token of the last turn is the most likely one."""
    if answer.problem or not turns:
        return answer._replace(problem=answer.problem or "the row could not be scored")
    return answer._replace(value=float(turns[-1].right == turns[-1].tokens))


def _options(answer: Answer) -> list[str]:
    """The answers that are compared: the expected one, and the same for the other options.

    Raises EvaluationError for a question without options.
    """
    options = options_of(answer.question)
    texts = rephrased(answer.expected, options) if options is not None else None
    if texts is None:
        raise EvaluationError(
            f"{answer.source}:{answer.line}: the metric likelihood needs a question with options (lines 'A. text') and an answer that "
            f"names one of them; the answer is {answer.expected!r}. Use another metric for this source (eval.metrics)"
        )
    return texts


def _most_likely(answer: Answer, texts: Sequence[str], scores: Sequence[Sequence[TurnScore] | None]) -> Answer:
    """With the option of the highest log-likelihood (a sum over its tokens) as the given answer."""
    if any(not turns for turns in scores):
        return answer._replace(problem="the row could not be scored")
    losses = [turns[-1].loss for turns in scores if turns]
    return answer._replace(given=texts[losses.index(min(losses))])


class _Reader:
    """Reads the prompts and tiles of some rows."""

    def __init__(
        self, facts: Facts, plans: VisualPlans, metrics: Mapping[int, str], config: Config, spec: VisualSpec, tokenizer: Any
    ) -> None:
        self.facts, self.plans, self.metrics, self.spec = facts, plans, metrics, spec
        self.encoder = CachedEncoder(tokenizer)
        self.limits, self.marker = media_limits(config.data.limits), config.eval.answer_after

    def read(self, rows: Sequence[int]) -> list[Question]:
        return [self._read(row) for row in rows]

    def _read(self, row: int) -> Question:
        question = Question(row, self.facts.address(row), generates=self.metrics[row] not in SCORED)
        try:
            sample = load_sample(question.address)
        except (RowError, OSError) as error:
            return question._replace(problem=str(error))
        last = last_answer(sample.messages)
        prompt = replace(sample, messages=sample.messages[:last])
        media = [*sample.images, *sample.videos]
        question = question._replace(
            text=last_question(prompt.messages),
            expected=final_answer(sample.messages[last]["content"], self.marker)[1],
            medium=_name(media[0]) if media else "",
        )
        if self.plans.status[row] != 0:
            return question._replace(problem=self.plans.reasons[self.plans.status[row]])
        if not question.generates:
            return question
        plan = sample_plan(self.facts, self.plans, row, self.spec)
        try:
            ids = encode(plan.render(prompt.messages, self.spec, add_generation_prompt=True), self.encoder).input_ids
            tiles = read_tiles(prompt.messages, prompt.images, prompt.videos, plan, self.spec, limits=self.limits)
        except (MediaChanged, MediaError, PromptError, OSError) as error:
            return question._replace(problem=str(error))
        return question._replace(input_ids=ids, tiles=tiles)


def _name(medium: Any) -> str:
    """The file of a medium; clips of one video have the same."""
    return str(getattr(medium, "path", None) or medium)


def _answer(model: nn.Module, tokenizer: Any, questions: Sequence[Question], config: Config, world: World, spec: VisualSpec) -> list[str]:
    """Answers to the questions that have a prompt, nothing for the others."""
    prompts = [question.input_ids for question in questions if question.input_ids is not None]
    tiles = [question.tiles for question in questions if question.tiles is not None]
    pixels = np.concatenate(tiles) if tiles else np.zeros((0, spec.tile_size, spec.tile_size, 3), np.uint8)
    together = is_sharded(model) and world.size > 1
    made = generate(model, tokenizer, prompts, pixels, max_new_tokens=config.eval.max_new_tokens, device=world.device, together=together)
    texts = iter(made)
    return ["" if question.input_ids is None else next(texts) for question in questions]
