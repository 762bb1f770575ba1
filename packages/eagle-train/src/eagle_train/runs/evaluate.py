"""Evaluation of a run on its held-out rows, with the text-only baseline; nothing is generated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from eagle_model.visual import VisualSpec
from eagle_train.config import Config, ConfigError, parse_config
from eagle_train.distributed.world import World
from eagle_train.evaluation.evaluate import check_metrics, evaluate
from eagle_train.evaluation.judge import Judge
from eagle_train.evaluation.metrics import Evaluation
from eagle_train.evaluation.text_only import TextOnlyBaseline

from .ready import Ready


class Evaluator:
    """Evaluates models of one run; keeps the last evaluation, and the baseline, which reads all training rows once.

    Raises ConfigError when the run has no held-out sources, and for `eval.metrics` that do not fit them.
    """

    def __init__(self, ready: Ready, world: World) -> None:
        if ready.eval_facts is None:
            raise ConfigError("the run has no held-out sources: name them in data.eval_sources or data.eval_recipe")
        check_metrics(ready.config, ready.eval_facts)
        self.ready, self.world, self.facts = ready, world, ready.eval_facts
        self.baseline = TextOnlyBaseline(ready.facts, ready.config.eval.answer_after)
        self.judge = make_judge(ready.config)
        self._last: tuple[object, Evaluation] | None = None

    def evaluate(
        self,
        model: nn.Module,
        step: int,
        *,
        limit: int | None = None,
        sources: Sequence[str] | None = None,
        frames: int | None = None,
        max_tokens: int | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Evaluation:
        """The evaluation of the model after `step` steps of the run, on the first `limit` rows of each source; a collective of all ranks.

        sources: names of those that are evaluated; default: all. frames: most frames of a video, in place of `sampling.max_frames`.
        max_tokens: budget of a sample; default: that of the last stage.
        The same step and options again give the same evaluation, without generating anything. Raises EvaluationError.
        """
        asked = (step, limit, sources, frames, max_tokens)
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        model.eval()
        ready = self.ready
        spec = with_frames(ready.spec, frames)
        done = evaluate(
            model,
            ready.tokenizer,
            self.facts,
            ready.config,
            self.world,
            spec,
            limit=limit,
            sources=sources,
            max_tokens=max_tokens,
            progress=progress,
        )
        done = judged(self.baseline.fill(done, self.world), self.judge, self.world)
        self._last = asked, done
        return done


def make_judge(config: Config) -> Judge | None:
    """The judge that is configured, if any."""
    return Judge(config.eval.judge) if config.eval.judge is not None else None


def judged(evaluation: Evaluation, judge: Judge | None, world: World) -> Evaluation:
    """With the judge's values, which the main rank requests; the other ranks get 0. A collective of all ranks."""
    if judge is None or all(answer.metric != "judge" for answer in evaluation.answers):
        return evaluation
    return world.first(lambda: _with_values(evaluation, judge)) or _with_values(evaluation, None)


def with_frames(spec: VisualSpec, frames: int | None) -> VisualSpec:
    """The spec with at most `frames` frames per video (None: unchanged); min_frames is lowered to it where it is larger."""
    return spec if frames is None else replace(spec, max_frames=frames, min_frames=min(spec.min_frames, frames))


def eval_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with `eval.KEY=VALUE` set, the only section that an evaluation may change. Raises ConfigError."""
    for override in overrides:
        if not override.startswith("eval."):
            raise ConfigError(f"--set {override!r}: an evaluation changes keys of the section eval only, for example eval.batch_size=4")
    section = config.eval.model_dump(mode="json", exclude_none=True)
    return config.replaced(eval=parse_config({"eval": section}, overrides, origin="--set").eval) if overrides else config


def _with_values(evaluation: Evaluation, judge: Judge | None) -> Evaluation:
    """The values of the sources that `judge` compares; without one (on the other ranks) they are 0."""
    places = [place for place, answer in enumerate(evaluation.answers) if answer.metric == "judge"]
    chosen = [evaluation.answers[place] for place in places]
    triples = [(answer.question, answer.expected, given) for answer in chosen for given in (answer.given, answer.text_only)]
    values = judge.values(triples) if judge is not None else [0.0] * len(triples)
    answers = list(evaluation.answers)
    for number, place in enumerate(places):
        answers[place] = answers[place]._replace(value=values[2 * number], text_only_value=values[2 * number + 1])
    return replace(evaluation, answers=tuple(answers))
