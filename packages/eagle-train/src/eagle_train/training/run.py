"""A run from end to end: tokenizer, facts, run folder, training, evaluation, export; what the verbs of the CLI call.

The run folder holds everything: `config.yaml` (complete), `facts/`, `checkpoints/`, `metrics.jsonl`, the ledgers, `answers.jsonl`,
`plot.png`, and `model/`, the result in the layout of released checkpoints.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from eagle_train.config import Config, ConfigError, dump_config, load_config
from eagle_train.data.facts import Facts
from eagle_train.data.prepare import Progress, load_facts, prepare

from . import checkpoint
from .deterministic import deterministic
from .evaluate import Blind, Evaluation, evaluate, training_pairs
from .model import build_model, load_run_tokenizer, model_facts
from .parallel import World, start_world
from .preview import record_drops
from .trainer import Trainer

logger = logging.getLogger(__name__)

# What may change when a run goes on: how it runs, and not what it computes.
_FREE = {"loader", "checkpoint", "eval", "parallel"}


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
    if world is None or world.is_main:
        facts = prepare(config, tokenizer, progress=progress).facts
        held_out = prepare(config, tokenizer, evaluation=True, progress=progress).facts if has_evaluation(config) else None
    if world is not None and world.size > 1:
        world.barrier()
        if not world.is_main:
            facts = load_facts(config, tokenizer)
            held_out = load_facts(config, tokenizer, evaluation=True) if has_evaluation(config) else None
    return Ready(config, tokenizer, facts, held_out)


def claim_folder(config: Config) -> None:
    """Write config.yaml, or make sure that the run that is there is the same one; raises ConfigError naming what differs."""
    path = config.run.folder / "config.yaml"
    if path.is_file() and checkpoint.latest(config.run.folder / "checkpoints") is not None:
        there = load_config(path).model_dump(mode="json")  # complete: a setting that is newer than the run has its default
        differing = sorted(_differences(there, config.model_dump(mode="json")))
        if differing:
            raise ConfigError(
                f"{config.run.folder} holds a run with other settings ({', '.join(differing[:6])}): "
                "give this one another run.name, or remove that folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_config(config), encoding="utf-8")
    temporary.replace(path)


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if path or key not in _FREE]
        return [name for key in keys for name in _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))]
    if path in ("run.log_every", "run.deterministic", "data.workers"):
        return []
    return [] if a == b else [path]


def train(
    ready: Ready,
    world: World,
    *,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    on_start: Callable[[Trainer], None] | None = None,
) -> Trainer:
    """Train what is left of the run, with evaluations on the way."""
    config = ready.config
    if world.is_main:
        claim_folder(config)
    world.barrier()
    blind = Blind(training_pairs(ready.facts)) if ready.eval_facts is not None else None

    def on_evaluate(model: nn.Module, stage: str) -> dict[str, Any] | None:
        assert ready.eval_facts is not None
        assert blind is not None
        done = ask(ready, model, world, blind=blind, limit=config.eval.limit)
        return {"scores": {name: score._asdict() for name, score in done.by_source().items()}, "accuracy": done.score().accuracy}

    with deterministic(config.run.deterministic):
        trainer = Trainer(
            config, ready.facts, ready.tokenizer, world, on_record=on_record, on_evaluate=on_evaluate if blind is not None else None
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


def write_answers(result: Evaluation, folder: Path) -> Path:
    """answers.jsonl: every question with the model's, the right and the blind answer; returns its path."""
    path = folder / "answers.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for answer in result.answers:
            file.write(json.dumps(answer._asdict() | {"right": answer.right}) + "\n")
    return path


def open_run(folder: str | Path) -> Config:
    """The configuration of a run folder; raises ConfigError when it is none."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml; runs are made by eagle train, under runs/")
    config = load_config(path)
    # A folder that was moved is still the same run.
    vars(config.run)["dir"], vars(config.run)["name"] = Path(folder).resolve().parent, Path(folder).resolve().name
    return config


def load_trained(config: Config, tokenizer: Any, world: World, path: Path | None = None) -> tuple[nn.Module, checkpoint.Progress]:
    """The model of a run with the weights of its newest checkpoint (or of `path`), on the world's device, whole on every rank."""
    path = path or checkpoint.latest(config.run.folder / "checkpoints")
    if path is None:
        raise checkpoint.CheckpointError(f"{config.run.folder}: there is no complete checkpoint yet")
    model = build_model(config, tokenizer)
    progress = checkpoint.read(path, model, None, world)
    return nn.Module.to(model, world.device).eval(), progress


def export(config: Config, folder: Path, *, checkpoint_path: Path | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Write a run's weights in the layout of the released checkpoints, with tokenizer and processor; returns what was written."""
    import torch

    from eagle_model.checkpoint import save_checkpoint
    from eagle_model.processor import EagleProcessor

    tokenizer = load_run_tokenizer(config)
    world = start_world(config.parallel.model_copy(update={"dtype": "float32"}), "cpu")
    model, progress = load_trained(config, tokenizer, world, checkpoint_path)
    save_checkpoint(model.state_dict(), model.config, folder, dtype=getattr(torch, dtype) if dtype else None)  # type: ignore[arg-type]
    sampling = config.sampling
    settings = {"fps": sampling.fps, "min_frames": sampling.min_frames, "max_frames": sampling.max_frames, "placement": sampling.placement}
    EagleProcessor.for_config(tokenizer, model.config, **settings).save_pretrained(folder)  # type: ignore[arg-type]
    return {"folder": str(folder), "from": asdict(progress)}
