"""Evaluation of a run on its held-out rows, with the text-only baseline; nothing is generated twice."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from eagle_train.config import ConfigError
from eagle_train.distributed.world import World
from eagle_train.evaluation.evaluate import evaluate
from eagle_train.evaluation.metrics import Evaluation
from eagle_train.evaluation.text_only import TextOnlyBaseline

from .ready import Ready


class Evaluator:
    """Evaluates models of one run; keeps the last evaluation, and the baseline, which reads all training rows once.

    Raises ConfigError when the run has no held-out sources.
    """

    def __init__(self, ready: Ready, world: World) -> None:
        if ready.eval_facts is None:
            raise ConfigError("the run has no held-out sources: name them in data.eval_sources or data.eval_recipe")
        self.ready, self.world, self.facts = ready, world, ready.eval_facts
        self.baseline = TextOnlyBaseline(ready.facts)
        self._last: tuple[int, int | None, Evaluation] | None = None

    def evaluate(
        self, model: nn.Module, step: int, *, limit: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """The evaluation of the model after `step` steps of the run, on the first `limit` rows of each source; a collective of all ranks.

        The same step and limit again give the same evaluation, without generating anything. Raises EvaluationError.
        """
        if self._last is not None and self._last[:2] == (step, limit):
            return self._last[2]
        model.eval()
        ready = self.ready
        done = evaluate(model, ready.tokenizer, self.facts, ready.config, self.world, ready.spec, limit=limit, progress=progress)
        done = self.baseline.fill(done, self.world)
        self._last = step, limit, done
        return done
