"""Evaluations of a model in training: when one is due, and what happens to the run when one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from eagle_train.config import Config
from eagle_train.distributed.sharding import reshard
from eagle_train.distributed.world import MainRankError, RankError, World
from eagle_train.errors import EvaluationError, describe

from .checkpoint import Progress
from .records import Records

logger = logging.getLogger(__name__)

T = TypeVar("T")

EvaluateModel = Callable[[nn.Module, int], dict[str, Any]]
"""(model, steps of the run) -> fields of the record; called on every rank."""


class Evaluations:
    """Of a run of `total_steps` steps. When one fails on any rank, a record says so, `failed` gets a sentence on every rank, and training
    continues."""

    def __init__(self, config: Config, world: World, records: Records, total_steps: int, evaluate: EvaluateModel | None) -> None:
        self.config, self.world, self.records, self.total_steps = config, world, records, total_steps
        self._evaluate = evaluate
        #: One sentence for every evaluation that failed.
        self.failed: list[str] = []

    def due(self, step: int, over: bool) -> bool:
        """Whether one follows `step` steps of a stage, which are all of them when it is `over`."""
        every = self.config.eval.every
        return self._evaluate is not None and (over if every is None else step % every == 0)

    def lost(self, progress: Progress) -> bool:
        """Whether the run ended between a checkpoint and the evaluation that follows it; the same on every rank."""
        lost = False
        if self.world.is_main and self.due(progress.step, progress.done):
            made = ("eval", "eval_failed")
            lost = not any(record["kind"] in made and record["total_step"] == progress.total_steps for record in self.records.metrics)
        return self.world.gather(lost)[0]

    def run(self, model: nn.Module, stage: str, total_step: int) -> None:
        """Evaluate, and write an "eval" record; a collective of all ranks."""
        evaluate = self._evaluate
        assert evaluate is not None
        result = self.attempt(model, stage, total_step, lambda: evaluate(model, total_step))
        if result is not None and self.world.is_main:
            self.records.write({"kind": "eval", "stage": stage, "total_step": total_step} | result)

    def attempt(self, model: nn.Module, stage: str, total_step: int, evaluate: Callable[[], T]) -> T | None:
        """What `evaluate()` returns, or None on every rank when it fails on one of them: the failure is logged and recorded.

        A collective of all ranks. Raises RankError when a rank fails in the middle of a collective, which nothing can continue.
        """
        failure, agreed, result = None, None, None
        model.eval()
        try:
            result = evaluate()
        except MainRankError:  # in what it does while all ranks wait: they left that together, and it says why below
            pass
        except RankError as error:
            self._note(stage, total_step, str(error), everywhere=False)
            raise
        except EvaluationError as error:  # the same on every rank
            failure = agreed = str(error)
        except Exception as error:
            failure = describe(error)
            logger.debug("evaluation failed", exc_info=True)
        model.train()
        reshard(model)  # the parameters outside of layers, and, where its forward raised, those of a layer
        failures = self.world.failures(failure)
        if not failures:
            return result
        self._note(stage, total_step, agreed or "; ".join(failures))
        return None

    def _note(self, stage: str, total_step: int, error: str, *, everywhere: bool = True) -> None:
        text = f"the evaluation of stage {stage} after step {total_step} failed: {error}"
        self.failed.append(text)
        # The only rank that knows writes it: the evaluation isn't tried again by the same command.
        if self.world.is_main or not everywhere:
            logger.error("%s%s", text, "; training continues" if everywhere and total_step < self.total_steps else "")
            self.records.write({"kind": "eval_failed", "stage": stage, "total_step": total_step, "error": error})
