"""A run from end to end: tokenizer, facts, run folder, training, evaluation, export; what the verbs of the CLI call.

The run folder holds everything: `config.yaml` (complete), `origin/` (its tokenizer), `facts/`, `checkpoints/`, `metrics.jsonl`, the
ledgers, `answers.jsonl`, `plot.png`, and `model/`, the result in the layout of released checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from eagle_train.config import Config, ConfigError
from eagle_train.data.facts import Facts
from eagle_train.data.prepare import Progress, load_facts, prepare

from . import checkpoint
from .deterministic import deterministic
from .evaluate import Blind, Evaluation, EvaluationError, evaluate, training_pairs
from .folder import claim_folder
from .lock import locked
from .model import build_model, load_run_tokenizer, model_facts
from .parallel import World, alone
from .precision import resolve_dtype, warn_of_slow_bfloat16
from .preview import record_drops
from .stop import StopSignals
from .trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass
class Ready:
    """A run that is prepared: facts of its rows, and of the held-out ones (None when there are none)."""

    config: Config
    tokenizer: Any
    facts: Facts
    eval_facts: Facts | None


def has_evaluation(config: Config) -> bool:
    """Whether held-out sources are configured."""
    return config.data.eval_recipe is not None or bool(config.data.eval_sources)


def get_ready(config: Config, world: World | None = None, progress: Callable[[Progress], None] | None = None) -> Ready:
    """Load the tokenizer and prepare all sources; with several ranks the first prepares and the others load what it made."""
    tokenizer = load_run_tokenizer(config)

    def ready(load: Callable[..., Facts]) -> Ready:
        return Ready(
            config, tokenizer, load(config, tokenizer), load(config, tokenizer, evaluation=True) if has_evaluation(config) else None
        )

    def measured(*given: Any, **options: Any) -> Facts:
        return prepare(*given, progress=progress, **options).facts

    if world is None:
        return ready(measured)
    return world.first(lambda: ready(measured)) or ready(load_facts)


def train(
    ready: Ready,
    world: World,
    *,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    on_start: Callable[[Trainer], None] | None = None,
    stop: StopSignals | None = None,
    on_slow: Callable[[str], None] | None = None,
) -> Trainer:
    """Train what is left of the run, with evaluations on the way. Raises ConfigError when the folder holds, or is used by, another run.

    stop: signals that are handled (default: none). The first one ends training with a checkpoint and `Interrupted`; an evaluation ends
    after its running batch of questions. on_slow: called on the main rank with a line about a step that takes longer than a minute.
    """
    ready = replace(ready, config=resolve_dtype(ready.config, world.device.type))
    config = ready.config
    if world.is_main:
        warn_of_slow_bfloat16(config, world.device.type)
    blind = Blind(training_pairs(ready.facts)) if ready.eval_facts is not None else None

    def on_evaluate(model: nn.Module, stage: str) -> dict[str, Any] | None:
        assert ready.eval_facts is not None
        assert blind is not None
        done = ask(ready, model, world, blind=blind, limit=config.eval.limit, progress=lambda *_: trainer.check_stop())
        return {"scores": {name: score._asdict() for name, score in done.by_source().items()}, "accuracy": done.score().accuracy}

    with contextlib.ExitStack() as until_the_end:

        def claim() -> None:
            until_the_end.enter_context(locked(config.run.folder))
            claim_folder(config, ready.tokenizer)

        world.first(claim)
        until_the_end.enter_context(deterministic(config.run.deterministic))
        trainer = Trainer(
            config,
            ready.facts,
            ready.tokenizer,
            world,
            on_record=on_record,
            on_evaluate=on_evaluate if blind is not None else None,
            stop=stop,
            on_slow=on_slow,
        )
        if world.is_main:
            record_drops(config, trainer.schedules)
        if on_start is not None:
            on_start(trainer)
        trainer.train()
    return trainer


def ask(
    ready: Ready,
    model: nn.Module,
    world: World,
    *,
    blind: Blind | None = None,
    facts: Facts | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate on held-out facts (the run's own when not given)."""
    held_out = facts if facts is not None else ready.eval_facts
    if held_out is None:
        raise ConfigError("the run has no held-out sources: name them in data.eval_sources or data.eval_recipe")
    blind = blind or Blind(training_pairs(ready.facts))
    model.eval()
    described = model_facts(model.config)  # type: ignore[arg-type]
    return evaluate(model, ready.tokenizer, held_out, ready.config, world, described, blind=blind, limit=limit, progress=progress)


def final_evaluation(
    ready: Ready, trainer: Trainer, world: World, *, limit: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Evaluation | None:
    """Evaluate the trained model on the run's held-out facts; None when that fails, which is logged and recorded as during training."""
    return trainer.attempt("final", trainer.total_steps, lambda: ask(ready, trainer.model, world, limit=limit, progress=progress))


def check_evaluations(trainer: Trainer) -> None:
    """Raises EvaluationError, naming each, when evaluations of a run failed whose training is complete."""
    if trainer.failed_evaluations:
        failed = "\n  ".join(trainer.failed_evaluations)
        raise EvaluationError(
            f"training is complete, but {len(trainer.failed_evaluations)} of its evaluations failed:\n  {failed}\n"
            f"The weights are in {trainer.checkpoints}; eagle eval {trainer.folder} evaluates them again"
        )


def write_answers(result: Evaluation, folder: Path) -> Path:
    """answers.jsonl: every question with the model's, the right and the blind answer; returns its path."""
    path = folder / "answers.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for answer in result.answers:
            file.write(json.dumps(answer._asdict() | {"right": answer.right}) + "\n")
    return path


def load_trained(config: Config, tokenizer: Any, world: World, path: Path | None = None) -> tuple[nn.Module, checkpoint.Progress]:
    """The model of a run with the weights of its newest checkpoint (or of `path`), on the world's device, whole on every rank."""
    path = path or checkpoint.latest(config.run.folder / "checkpoints")
    if path is None:
        raise checkpoint.CheckpointError(f"{config.run.folder}: there is no complete checkpoint yet")
    model = build_model(config, tokenizer, weights=False)
    progress = checkpoint.read(path, model, None, world)
    return nn.Module.to(model, world.device).eval(), progress


def export(config: Config, folder: Path, *, checkpoint_path: Path | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Write a run's weights in the layout of the released checkpoints, with tokenizer and processor; returns what was written."""
    import torch

    from eagle_model.checkpoint import save_checkpoint
    from eagle_model.processor import EagleProcessor

    tokenizer = load_run_tokenizer(config)
    model, progress = load_trained(config, tokenizer, alone("cpu"), checkpoint_path)
    save_checkpoint(model.state_dict(), model.config, folder, dtype=getattr(torch, dtype) if dtype else None)  # type: ignore[arg-type]
    sampling = config.sampling
    settings = {"fps": sampling.fps, "min_frames": sampling.min_frames, "max_frames": sampling.max_frames, "placement": sampling.placement}
    EagleProcessor.for_config(tokenizer, model.config, **settings).save_pretrained(folder)  # type: ignore[arg-type]
    return {"folder": str(folder), "from": asdict(progress)}
