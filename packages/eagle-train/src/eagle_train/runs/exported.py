"""Folders of exported and released models: loading one, and evaluating it as a run is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eagle_train.config import Config, Source, parse_config
from eagle_train.data.facts import Facts
from eagle_train.data.prepare import Progress, load_facts, prepare
from eagle_train.distributed.world import World
from eagle_train.evaluation.evaluate import evaluate
from eagle_train.evaluation.metrics import Evaluation
from eagle_train.training.model import check_model_folder

from .evaluate import eval_overrides, judged, make_judge, with_frames
from .sweep import Point, sweep

if TYPE_CHECKING:
    import torch

    from eagle_model.eagle import EagleForConditionalGeneration
    from eagle_model.processor import EagleProcessor


def load_exported(folder: Path, device: torch.device) -> tuple[EagleForConditionalGeneration, EagleProcessor]:
    """Model and processor of a folder, on `device`: in bfloat16 on a GPU, in float32 on a CPU.

    Raises ConfigError for a folder of another model, before anything is loaded.
    """
    import torch

    from eagle_model.loading import load_model
    from eagle_model.processor import EagleProcessor

    check_model_folder(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_model(folder, device=device, dtype=dtype), EagleProcessor.from_pretrained(folder)


def evaluation_config(folder: Path, processor: EagleProcessor, positions: int, source: Source, out: Path) -> Config:
    """The configuration of an evaluation of the model in `folder` on one source, with the visual pipeline and prompt of its processor.

    positions: budget of a sample when the processor states none. out: folder of the ledger and of facts.
    """
    spec = processor.spec
    config = parse_config(
        {
            "model": {"path": str(folder)},
            "data": {
                "eval_sources": {source.stem: source.model_dump(mode="json", exclude_none=True)},
                "remote": {"schemes": sorted(source.schemes)},
            },
            "prompt": {"system": processor.system_prompt},
            "sampling": {name: getattr(spec, name) for name in ("strategy", "fps", "min_frames", "max_frames", "placement")},
            "tiling": {name: getattr(spec, name) for name in ("min_tiles", "max_tiles", "thumbnail")},
            "stages": [{"name": "evaluation", "max_tokens": processor.max_tokens or positions}],
        },
        base=out.parent,
    )
    return config.replaced(run=config.run.replaced(dir=out.parent, name=out.name))  # any name: the folder is the user's choice


def evaluate_exported(
    folder: Path,
    source: Source,
    out: Path,
    world: World,
    *,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    frames: Sequence[int] = (),
    lengths: Sequence[int] = (),
    on_prepare: Callable[[Progress], None] | None = None,
    on_answer: Callable[[int, int, str], None] | None = None,
) -> tuple[list[Point], Facts]:
    """Evaluations of the model in `folder` on the rows of `source`, without a text-only baseline, since there are no training rows.

    overrides: `eval.KEY=VALUE`, in place of `EvalConfig`'s. frames, lengths: as in `sweep`; empty: one evaluation. Every rank calls it.
    Raises ConfigError, PrepareError and EvaluationError.
    """
    model, processor = load_exported(folder, world.device)
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    config = evaluation_config(folder, processor, model.config.text_config.max_position_embeddings, source, out)
    config = eval_overrides(config, overrides)
    facts = world.first(lambda: prepare(config, tokenizer, evaluation=True, progress=on_prepare).facts)
    if facts is None:
        facts = load_facts(config, tokenizer, evaluation=True)

    judge = make_judge(config)

    def evaluate_at(count: int | None, length: int | None) -> Evaluation:
        spec = with_frames(processor.spec, count)
        made = evaluate(model, tokenizer, facts, config, world, spec, limit=limit, max_tokens=length, progress=on_answer)
        return judged(made, judge, world)

    return sweep(evaluate_at, frames=frames, lengths=lengths, baseline=False), facts
