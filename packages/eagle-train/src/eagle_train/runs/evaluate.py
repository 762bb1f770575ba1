"""Evaluation of a run on its held-out rows, with the text-only baseline; nothing is generated twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from eagle_train.config import ConfigError
from eagle_train.distributed.world import World
from eagle_train.evaluation.evaluate import check_metrics, evaluate
from eagle_train.evaluation.judge import Judge
from eagle_train.evaluation.metrics import Evaluation
from eagle_train.evaluation.text_only import TextOnlyBaseline
from eagle_train.planning.visual import visual_spec

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
        self.baseline = TextOnlyBaseline(ready.facts)
        self.judge = Judge(ready.config.eval.judge) if ready.config.eval.judge is not None else None
        self._last: tuple[object, Evaluation] | None = None

    def evaluate(
        self,
        model: nn.Module,
        step: int,
        *,
        limit: int | None = None,
        frames: int | None = None,
        max_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """The evaluation of the model after `step` steps of the run, on the first `limit` rows of each source; a collective of all ranks.

        frames: most frames of a video, in place of `sampling.max_frames`. max_tokens: budget of a sample; default: that of the last stage.
        The same step and options again give the same evaluation, without generating anything. Raises EvaluationError.
        """
        asked = (step, limit, frames, max_tokens)
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        model.eval()
        ready, spec = self.ready, self.ready.spec
        if frames is not None:
            sampling = ready.config.sampling
            sampling = sampling.replaced(max_frames=frames, min_frames=min(sampling.min_frames, frames))
            spec = visual_spec(ready.config.replaced(sampling=sampling), model.config)
        done = evaluate(
            model, ready.tokenizer, self.facts, ready.config, self.world, spec, limit=limit, max_tokens=max_tokens, progress=progress
        )
        done = self._judged(self.baseline.fill(done, self.world))
        self._last = asked, done
        return done

    def _judged(self, evaluation: Evaluation) -> Evaluation:
        """With the judge's values, on the main rank; a collective of all ranks."""
        judge = self.judge
        if judge is None or all(answer.metric != "judge" for answer in evaluation.answers):
            return evaluation
        return self.world.first(lambda: _with_values(evaluation, judge)) or _with_values(evaluation, None)


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
