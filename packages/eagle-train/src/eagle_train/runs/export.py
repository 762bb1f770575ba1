"""The result of a run: its trained model, the processor that serves it as it was trained, and both as an exported folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from eagle_model.processor import EagleProcessor
from eagle_model.prompt import IM_END
from eagle_train.config import Config, ConfigError, load_config
from eagle_train.distributed.world import World, alone
from eagle_train.errors import TrainError
from eagle_train.planning.visual import visual_spec
from eagle_train.training import checkpoint
from eagle_train.training.build import build_model
from eagle_train.training.ema import MovingAverage
from eagle_train.training.model import load_run_tokenizer


class ExportError(TrainError, RuntimeError):
    """What would be written is not the trained model."""


def load_trained(
    config: Config, tokenizer: Any, world: World, path: Path | None = None, *, ema: bool = False
) -> tuple[nn.Module, checkpoint.Progress]:
    """The model of a run with the weights of its newest checkpoint (or of `path`), on the world's device, whole on every rank.

    ema: the moving average of the trained weights; raises ConfigError for a run without one.
    """
    path = path or checkpoint.latest(config.run.folder / "checkpoints")
    if path is None:
        raise checkpoint.CheckpointError(f"{config.run.folder}: there is no complete checkpoint yet")
    model = build_model(config, tokenizer, weights=False)
    average = None
    if ema:
        if config.model.ema is None:
            raise ConfigError(f"{config.run.folder} has no moving average: model.ema was not set; export without --ema")
        average = MovingAverage(model, config, config.model.ema).tensors
    progress = checkpoint.read(path, model, None, world, average=average)
    model.load_state_dict(average or {}, strict=False)
    return nn.Module.to(model, world.device).eval(), progress


def run_processor(config: Config, tokenizer: Any, described: Any) -> EagleProcessor:
    """The processor of a run: the visual pipeline, system prompt and largest budget that it is trained with. described: its EagleConfig."""
    return EagleProcessor(
        tokenizer,
        system_prompt=config.prompt.system,
        max_tokens=config.max_tokens,
        **visual_spec(config, described).to_dict(),
    )


MERGING_ERROR = 1e-3
"""Largest change of a logit, relative to the largest logit, that merging adapters in float32 may make; it is about 1e-6."""


def export_adapter(
    config: Config, folder: Path, *, checkpoint_path: Path | None = None, dtype: str | None = None, ema: bool = False
) -> dict[str, Any]:
    """Write the adapters of a run in PEFT's format; returns what was written. Raises ConfigError for a run without adapters.

    A run that trains nothing else belongs to the checkpoint that it started from (`model.path`). For all others the weights without the
    adapters, in `dtype`, and the processor are written to `folder/base`.
    """
    from eagle_model.lora import remove_lora, save_adapter
    from eagle_model.quantized import dequantize

    if not config.adapters:
        raise ConfigError(f"{config.run.folder} has no adapters: no stage trains a part as lora; export its weights without --adapter")
    tokenizer = load_run_tokenizer(config)
    model, progress = load_trained(config, tokenizer, alone("cpu"), checkpoint_path, ema=ema)
    start = load_config(config.run.folder / "config.yaml").model.path
    only_adapters = start is not None and all("full" not in stage.modes.values() for stage in config.stages)
    save_adapter(model, folder, base=start if only_adapters else str(folder / "base"))
    if not only_adapters:
        remove_lora(model)
        dequantize(model)
        _save(config, model, tokenizer, folder / "base", dtype)
    return {"folder": str(folder), "from": asdict(progress)}


def export(
    config: Config, folder: Path, *, checkpoint_path: Path | None = None, dtype: str | None = None, ema: bool = False
) -> dict[str, Any]:
    """Write a run's weights in the layout of the released checkpoints, with tokenizer and processor; returns what was written.

    ema: write the moving average of the weights. Adapters are merged into the weights, and weights in 4 bits become plain ones. Raises
    ExportError when this changes the logits by more than rounding.
    """
    tokenizer = load_run_tokenizer(config)
    model, progress = load_trained(config, tokenizer, alone("cpu"), checkpoint_path, ema=ema)
    if config.adapters or config.model.quantize:
        from eagle_model.lora import merge_checked

        error = merge_checked(model)
        if not error < MERGING_ERROR:
            raise ExportError(
                f"merging the adapters changes logits by {error:.1e} of the largest, expected less than {MERGING_ERROR:.0e}; "
                "nothing was written. Export the adapters by themselves with --adapter, and report this"
            )
    _save(config, model, tokenizer, folder, dtype)
    return {"folder": str(folder), "from": asdict(progress)}


def _save(config: Config, model: Any, tokenizer: Any, folder: Path, dtype: str | None) -> None:
    """Weights, configuration, tokenizer and processor, in the layout of the released checkpoints."""
    import torch

    from eagle_model.checkpoint import save_checkpoint

    end = int(tokenizer.convert_tokens_to_ids(IM_END))
    save_checkpoint(model.state_dict(), model.config, folder, dtype=getattr(torch, dtype) if dtype else None, end_token_id=end)
    run_processor(config, tokenizer, model.config).save_pretrained(folder)
