"""The model of a run: from a preset or a checkpoint folder, with the tokenizer that belongs to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_model.prompt import IMG_CONTEXT
from eagle_train.config import Config, ConfigError
from eagle_train.planning.visual import ModelFacts

if TYPE_CHECKING:
    from eagle_model.eagle import EagleForConditionalGeneration


def tokenizer_folder(config: Config) -> Path:
    """Where the run's tokenizer is: model.tokenizer, or the checkpoint folder it starts from."""
    folder = config.model.tokenizer or config.model.path
    if folder is None:
        raise ConfigError(
            f"model: preset {config.model.origin!r} brings no tokenizer; name a folder in model.tokenizer "
            "(eagle_model.tokenizer can train one)"
        )
    if not Path(folder).is_dir():
        raise ConfigError(
            f"model.tokenizer: {folder} is not a folder; "
            "name that of a Hugging Face tokenizer: one beside a checkpoint, or one that eagle_model.tokenizer trained"
        )
    return Path(folder)


def load_run_tokenizer(config: Config) -> Any:
    """The run's tokenizer, with Eagle's tokens."""
    from eagle_model.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder(config))


def model_config(config: Config, tokenizer: Any) -> Any:
    """EagleConfig of the run: the preset's or the checkpoint's, with overrides, and ids and sizes that fit the tokenizer."""
    from eagle_model.configuration import EagleConfig
    from eagle_model.presets import PRESETS, preset

    if config.model.path is not None:
        result = EagleConfig.from_pretrained(config.model.path)
        if config.model.overrides:
            result = EagleConfig(**_merged(result.to_dict(), config.model.overrides))
        result.image_token_index = int(tokenizer.convert_tokens_to_ids(IMG_CONTEXT))
    else:
        name = config.model.preset or "tiny"
        if name not in PRESETS:
            raise ConfigError(f"model.preset: there is no preset {name!r}; known: {', '.join(PRESETS)}")
        result = preset(name, tokenizer=tokenizer, **config.model.overrides)
    result.min_dynamic_tiles, result.max_dynamic_tiles = config.tiling.min_tiles, config.tiling.max_tiles
    result.use_thumbnail = config.tiling.thumbnail
    return result


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def model_facts(model: Any) -> ModelFacts:
    """What planning must know of an EagleConfig."""
    return ModelFacts(model.tile_size, model.tokens_per_tile)


def build_model(config: Config, tokenizer: Any) -> EagleForConditionalGeneration:
    """The model on the CPU in float32: random weights from run.seed, or the checkpoint's weights."""
    import torch

    from eagle_model.checkpoint import load_checkpoint
    from eagle_model.eagle import EagleForConditionalGeneration

    described = model_config(config, tokenizer)
    torch.manual_seed(config.run.seed)
    model = EagleForConditionalGeneration(described).float()
    if config.model.path is not None:
        load_checkpoint(model, config.model.path)
        if len(tokenizer) > described.text_config.vocab_size:
            model.resize_token_embeddings(len(tokenizer))
    return model
