"""What the model of a run is: from a preset, a checkpoint, or a vision tower and a language model, with the tokenizer that belongs to it.

Nothing is allocated here; `build.py` makes the model.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_model.prompt import IM_END, IMG_CONTEXT
from eagle_train.config import Config, ConfigError
from eagle_train.config.load import nearest
from eagle_train.config.section import is_hub_name
from eagle_train.distributed.precision import auto_dtype

if TYPE_CHECKING:
    import torch

    from eagle_model.configuration import EagleConfig


# Fields of EagleConfig that other settings decide.
_DECIDED_ELSEWHERE = {
    "min_dynamic_tiles": "tiling.min_tiles",
    "max_dynamic_tiles": "tiling.max_tiles",
    "min_dynamic_patch": "tiling.min_tiles",
    "max_dynamic_patch": "tiling.max_tiles",
    "use_thumbnail": "tiling.thumbnail",
    "image_token_index": "model.tokenizer",
}


def check_preset(config: Config) -> None:
    """Raises ConfigError, naming the known ones, when the model starts from a preset that does not exist."""
    from eagle_model.presets import PRESETS

    model = config.model
    name = model.preset or "tiny"
    if model.path is None and model.vision is None and name not in PRESETS:
        raise ConfigError(f"model.preset: there is no preset {name!r}; known: {', '.join(PRESETS)}")


def located(config: Config, key: str) -> Path:
    """The folder (or GGUF file) that `model.<key>` names, downloaded when it is a name on the hub that is not in the cache.

    Raises ConfigError, naming the key, when it is not there.
    """
    from eagle_model.hub import checkpoint_folder

    name = getattr(config.model, key)
    try:
        return _downloaded(name) if is_hub_name(name) else checkpoint_folder(name)
    except FileNotFoundError as error:
        raise ConfigError(f"model.{key}: {error}") from error


@functools.cache
def _downloaded(name: str) -> Path:
    """The hub is queried once per name and process."""
    from eagle_model.hub import checkpoint_folder

    return checkpoint_folder(name)


def tokenizer_folder(config: Config) -> Path:
    """Where the run's tokenizer is: model.tokenizer, or that of the checkpoint or language model that it starts from."""
    key = next((key for key in ("tokenizer", "path", "language") if getattr(config.model, key) is not None), None)
    if key is None:
        check_preset(config)
        raise ConfigError(
            f"model: preset {config.model.origin!r} has no tokenizer. Train a small one from your own text: eagle tokenizer FOLDER "
            "TEXT..., and set model.tokenizer: FOLDER; or set model.tokenizer to that of a language model (folder or hub name)"
        )
    return located(config, key)


def check_model_folder(folder: str | Path) -> None:
    """Raises ConfigError unless `folder` holds an Eagle model, from its config.json alone: nothing is allocated for another model."""
    from eagle_model.sizes import MODEL_TYPE

    folder = Path(folder)
    path = folder / "config.json"
    wanted = "give the folder of a run of eagle train (it has a config.yaml), or of an exported or released Eagle 2.5 model"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; {wanted}. A model of the Hugging Face hub is downloaded first: hf download NAME")
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise ConfigError(
            f"{folder} holds an adapter in PEFT's format and no model; eagle export RUN FOLDER without --adapter merges it into one. A run "
            "starts from an adapter with model.adapter"
        )
    if not path.is_file():
        raise ConfigError(f"{folder} holds no model: it has neither config.yaml nor config.json; {wanted}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read as JSON ({error}); {wanted}") from error
    found = content.get("model_type") if isinstance(content, dict) else None
    if found != MODEL_TYPE:
        raise ConfigError(f"{path}: model_type is {found!r}, and only {MODEL_TYPE!r} can be loaded; {wanted}")


def load_run_tokenizer(config: Config) -> Any:
    """The run's tokenizer. Eagle's tokens are added to that of a language model; that of a checkpoint must have them."""
    from eagle_model.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder(config), add_tokens=config.model.path is None)


def model_config(config: Config, tokenizer: Any) -> Any:
    """EagleConfig of the run: that of the preset, the checkpoint or the parts, with overrides, and ids that fit the tokenizer.

    Raises ConfigError for an unknown preset, attention backend, or key of the overrides, and for a value that a field can't have.
    """
    from huggingface_hub.errors import StrictDataclassError

    overrides = config.model.overrides
    check_preset(config)
    _check_attention_name(config.model.attention)
    _check_overrides(overrides)
    try:
        result = _with_overrides(config, tokenizer)
    except (StrictDataclassError, ValueError) as error:
        if not overrides:
            raise
        raise ConfigError(f"model.overrides: {error}") from error
    result.min_dynamic_tiles, result.max_dynamic_tiles = config.tiling.min_tiles, config.tiling.max_tiles
    result.use_thumbnail = config.tiling.thumbnail
    return result


def grown_config(config: Config, tokenizer: Any) -> EagleConfig:
    """As `model_config`, with the vocabulary that the model has once Eagle's tokens are in it: for sizes, not for reading weights."""
    described = copy.deepcopy(model_config(config, tokenizer))
    described.text_config.vocab_size = max(described.text_config.vocab_size, len(tokenizer))
    return described


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    for part in ("text_config", "vision_config"):
        if part in overrides and not isinstance(overrides[part], Mapping):
            raise ConfigError(f"model.overrides.{part}: is {overrides[part]!r}, expected fields and their values")
    for key in overrides:
        if key in _DECIDED_ELSEWHERE:
            raise ConfigError(f"model.overrides.{key}: {_DECIDED_ELSEWHERE[key]} decides this; set it there")
    if "rope_theta" in overrides.get("text_config", {}):  # the older spelling yields to the newer one, which is always there
        raise ConfigError("model.overrides.text_config.rope_theta: write rope_parameters: {rope_type: default, rope_theta: ...}")


def _with_overrides(config: Config, tokenizer: Any) -> EagleConfig:
    from eagle_model.configuration import EagleConfig
    from eagle_model.presets import check_changes, preset

    model = config.model
    if model.vision is not None:
        return _parts_config(config, tokenizer)
    if model.path is None:
        return preset(model.preset or "tiny", tokenizer=tokenizer, **model.overrides)
    folder = located(config, "path")
    check_model_folder(folder)
    result = EagleConfig.from_pretrained(folder)
    if config.model.overrides:
        result = EagleConfig(**_merged(result.to_dict(), config.model.overrides))
        check_changes(result, config.model.overrides)
    result.image_token_index = int(tokenizer.convert_tokens_to_ids(IMG_CONTEXT))
    result.text_config.eos_token_id = int(tokenizer.convert_tokens_to_ids(IM_END))
    return result


def _parts_config(config: Config, tokenizer: Any) -> EagleConfig:
    from eagle_model.parts import parts_config

    vision, language = located(config, "vision"), located(config, "language")
    try:
        return parts_config(vision, language, tokenizer, image_size=config.model.image_size, **config.model.overrides)
    except (FileNotFoundError, ImportError) as error:
        raise ConfigError(f"model: {error}") from error
    except ValueError as error:
        if config.model.overrides:
            raise
        raise ConfigError(f"model: {error}") from error


def _check_attention_name(name: str) -> None:
    if name == "auto":
        return
    from eagle_cp.backends import KERNELS

    if name not in KERNELS:
        raise ConfigError(f"model.attention: there is no backend {name!r}{nearest(name, ['auto', *KERNELS])}")


def attention_backend(config: Config, described: Any, device: torch.device) -> str | None:
    """The backend that `model.attention` names (None: the fastest); raises ConfigError when it can't run on `device`."""
    if config.model.attention == "auto":
        return None
    import torch

    from eagle_cp.backends import choose
    from eagle_model.language.spec import head_dim

    try:
        dtype = auto_dtype(device.type) if config.parallel.dtype == "auto" else config.parallel.dtype
        choose(device, getattr(torch, dtype), head_dim(described.text_config), backend=config.model.attention)
    except ValueError as error:
        raise ConfigError(f"model.{error}; model.attention: auto takes the fastest one that can") from error
    return config.model.attention


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result
