"""Sizes of a run's model, which planning needs: from what preset or checkpoint state, without torch, where that is enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eagle_model.flops import forward_flops
from eagle_model.presets import IN_USE, PRESETS
from eagle_model.sizes import ModelSizes, stated_sizes
from eagle_train.config import Config, StageConfig
from eagle_train.planning.costs import CostModel, cost_model

from .model import check_model_folder, check_preset, model_config

_WITHOUT_EFFECT = {"preset", "path", "tokenizer", "activations", "lora", "adapter", "ema", "quantize", "fp8", "weights", "gpu_memory"}
"""Keys of `model` that are read here, or change no size."""


def model_sizes(config: Config, tokenizer: Any) -> Any:
    """`ModelSizes` where the preset or the config.json of `model.path` states them all, else the run's `EagleConfig`, which imports torch.

    Both give the same sizes. Raises ConfigError as `model_config` does.
    """
    return _stated(config) or model_config(config, tokenizer)


def stage_costs(config: Config, stage: StageConfig, sizes: Any, tokenizer: Any, *, timed: bool = False) -> CostModel:
    """What packs of a stage cost. sizes: those of `model_sizes`; what they do not state is read from the run's `EagleConfig`.

    timed: with `model.fp8`, FLOPs of bfloat16 that take as long as the step's own (`cost_model`).
    """
    flops = forward_flops(sizes) or forward_flops(model_config(config, tokenizer))
    assert flops is not None  # an EagleConfig states everything
    return cost_model(flops, stage.modes, config.model.fp8 if timed else None)


def _stated(config: Config) -> ModelSizes | None:
    model = config.model
    fields = type(model).model_fields.items()
    if any(getattr(model, name) != field.get_default(call_default_factory=True) for name, field in fields if name not in _WITHOUT_EFFECT):
        return None  # it may change sizes, and `model_config` checks it
    if model.path is None:
        check_preset(config)
        values = IN_USE | PRESETS[model.preset or "tiny"]
        return stated_sizes({"force_image_size": values["vision_config"]["image_size"]} | values)
    if not Path(model.path).is_dir():
        return None
    check_model_folder(model.path)
    return stated_sizes(json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8")))
