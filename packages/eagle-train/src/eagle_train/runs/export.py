"""The result of a run: its trained model, the processor that serves it as it was trained, and both as an exported folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from eagle_model.processor import EagleProcessor
from eagle_model.prompt import IM_END
from eagle_train.config import Config
from eagle_train.distributed.world import World, alone
from eagle_train.planning.visual import visual_spec
from eagle_train.training import checkpoint
from eagle_train.training.model import build_model, load_run_tokenizer


def load_trained(config: Config, tokenizer: Any, world: World, path: Path | None = None) -> tuple[nn.Module, checkpoint.Progress]:
    """The model of a run with the weights of its newest checkpoint (or of `path`), on the world's device, whole on every rank."""
    path = path or checkpoint.latest(config.run.folder / "checkpoints")
    if path is None:
        raise checkpoint.CheckpointError(f"{config.run.folder}: there is no complete checkpoint yet")
    model = build_model(config, tokenizer, weights=False)
    progress = checkpoint.read(path, model, None, world)
    return nn.Module.to(model, world.device).eval(), progress


def run_processor(config: Config, tokenizer: Any, described: Any) -> EagleProcessor:
    """The processor of a run: the visual pipeline, system prompt and largest budget that it is trained with. described: its EagleConfig."""
    return EagleProcessor(
        tokenizer,
        system_prompt=config.prompt.system,
        max_tokens=max(stage.max_tokens for stage in config.stages),
        **visual_spec(config, described).to_dict(),
    )


def export(config: Config, folder: Path, *, checkpoint_path: Path | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Write a run's weights in the layout of the released checkpoints, with tokenizer and processor; returns what was written."""
    import torch

    from eagle_model.checkpoint import save_checkpoint

    tokenizer = load_run_tokenizer(config)
    model, progress = load_trained(config, tokenizer, alone("cpu"), checkpoint_path)
    save_checkpoint(
        model.state_dict(),
        model.config,  # type: ignore[arg-type]
        folder,
        dtype=getattr(torch, dtype) if dtype else None,
        end_token_id=int(tokenizer.convert_tokens_to_ids(IM_END)),
    )
    run_processor(config, tokenizer, model.config).save_pretrained(folder)
    return {"folder": str(folder), "from": asdict(progress)}
