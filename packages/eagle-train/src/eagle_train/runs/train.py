"""Training of a run from end to end: the folder is claimed, stages are planned, the model is built, trained and evaluated.

The run folder holds everything: `config.yaml` (complete), `origin/` (its tokenizer), `facts/`, `checkpoints/`, `metrics.jsonl`, the
ledgers, `answers.jsonl`, `plot.png`, and `model/`, the result in the layout of released checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from eagle_train.distributed.precision import check_fp8, warn_of_slow_bfloat16, warn_of_slow_fp8
from eagle_train.distributed.world import World
from eagle_train.errors import EvaluationError
from eagle_train.evaluation.metrics import Answer, Evaluation
from eagle_train.training.deterministic import deterministic
from eagle_train.training.profile import StepProfile
from eagle_train.training.startup import StartUp
from eagle_train.training.stop import StopSignals
from eagle_train.training.trainer import Trainer

from .evaluate import Evaluator
from .folder import claim_folder, resolve_dtype
from .lock import locked
from .ready import Ready
from .sweep import Point, sweep


@dataclass(frozen=True)
class Trained:
    """A run whose stages are trained. evaluator: None without held-out sources."""

    trainer: Trainer
    evaluator: Evaluator | None

    def final_evaluation(self, *, limit: int | None = None, progress: Callable[[int, int, str], None] | None = None) -> Evaluation | None:
        """The evaluation of the trained model: the last one of training if that was the same, else a new one.

        None when it fails, which is logged and recorded as during training, or without held-out sources; a collective of all ranks.
        """
        if (evaluator := self.evaluator) is None:
            return None
        trainer, last = self.trainer, self.trainer.total_steps
        return trainer.evaluations.attempt(
            trainer.model, "final", last, lambda: evaluator.evaluate(trainer.model, last, limit=limit, progress=progress)
        )

    def evaluations_by_frames(
        self, frames: Sequence[int], sources: Sequence[str], *, progress: Callable[[int, int, str], None] | None = None
    ) -> list[Point] | None:
        """The trained model on `sources`, once for every number of frames that a video has at most.

        None as of `final_evaluation`; a collective of all ranks.
        """
        if (evaluator := self.evaluator) is None:
            return None
        trainer, last = self.trainer, self.trainer.total_steps

        def at(most: int | None, max_tokens: int | None) -> Evaluation:
            return evaluator.evaluate(trainer.model, last, sources=sources, frames=most, max_tokens=max_tokens, progress=progress)

        return trainer.evaluations.attempt(trainer.model, "frames", last, lambda: sweep(at, frames=frames))

    def check_evaluations(self) -> None:
        """Raises EvaluationError, naming each, when evaluations failed."""
        failed = self.trainer.evaluations.failed
        if failed:
            names = "\n  ".join(failed)
            raise EvaluationError(
                f"training is complete, but {len(failed)} of its evaluations failed:\n  {names}\n"
                f"The weights are in {self.trainer.checkpoints}; eagle eval {self.trainer.folder} evaluates them again"
            )


def train(
    ready: Ready,
    world: World,
    *,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    on_start: Callable[[Trainer], None] | None = None,
    stop: StopSignals | None = None,
    on_slow: Callable[[str], None] | None = None,
    on_answers: Callable[[Sequence[Answer]], None] | None = None,
    profile: int | None = None,
    startup: StartUp | None = None,
) -> Trained:
    """Train the remaining steps of the run, with its evaluations. Raises ConfigError when the folder holds, or is used by, another run.

    stop: signals that are handled (default: none). The first one ends training with a checkpoint and `Interrupted`; an evaluation ends
    after its running batch of questions. on_slow: called on the main rank with a line about a step that takes longer than a minute.
    on_answers: called on every rank with the answers of an evaluation, before its record. profile: steps of which the main rank writes a
    torch profile to `<run folder>/profile`. startup: phases before this call, for the record of the first step.
    """
    ready = replace(ready, config=resolve_dtype(ready.config, world.device.type))
    config = ready.config
    if world.is_main:
        warn_of_slow_bfloat16(config, world.device.type)
        warn_of_slow_fp8(config, world.device.type)
    check_fp8(config, world.device.type)
    evaluator = Evaluator(ready, world) if ready.eval_facts is not None else None

    def on_evaluate(model: nn.Module, step: int) -> dict[str, Any]:
        assert evaluator is not None
        done = evaluator.evaluate(model, step, limit=config.eval.limit, progress=lambda *_: trainer.check_stop())
        if on_answers is not None:
            on_answers(done.answers)
        return done.record()

    with contextlib.ExitStack() as until_the_end:

        def claim() -> None:
            until_the_end.enter_context(locked(config.run.folder))
            claim_folder(config, ready.tokenizer)

        world.first(claim)
        until_the_end.enter_context(deterministic(config.run.deterministic))
        trainer = Trainer(
            config,
            ready.schedules,
            ready.tokenizer,
            world,
            on_record=on_record,
            on_evaluate=on_evaluate if evaluator is not None else None,
            stop=stop,
            on_slow=on_slow,
            startup=startup,
        )
        if world.is_main:
            ready.record_drops()
        if evaluator is not None and world.is_main and config.loader.workers:  # 0: this program can't start processes, or is short of cores
            evaluator.baseline.count_in_background()
        if on_start is not None:
            on_start(trainer)
        if profile is not None and world.is_main:
            recorded = until_the_end.enter_context(StepProfile(config.run.folder / "profile", profile))
            trainer.after_step = recorded.step
        trainer.train()
    return Trained(trainer, evaluator)
