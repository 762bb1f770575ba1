"""What a pretrained vision tower and a pretrained language model become as one Eagle: their folders and the joint configuration.

Reads configuration files only; `eagle_model.pretrained` reads the weights.
"""

import json
from pathlib import Path
from typing import Any

from eagle_model.configuration import EagleConfig
from eagle_model.language.spec import decoder_spec
from eagle_model.presets import IN_USE, check_changes
from eagle_model.prompt import IM_END, IMG_CONTEXT
from eagle_model.tokenizer import check_tokenizer

#: `model_type` of configurations whose vision tower is read: both towers of one model, or the vision tower alone.
VISION_TYPES = ("siglip", "siglip_vision_model")


def parts_config(vision: Path, language: Path, tokenizer: Any, *, image_size: int | None = None, **changes: Any) -> EagleConfig:
    """The configuration of a model of two checkpoints, given by the paths that `eagle_model.hub.checkpoint_folder` returns.

    The vocabulary is the language model's own; answers end at `<|im_end|>`, whatever the tokenizer's own end token is. image_size: side of
    a tile in pixels (default: the tower's). changes: other fields of `EagleConfig`; those of `vision_config` and `text_config` update the
    parts.

    Raises FileNotFoundError without a config.json, and ValueError for a model of another kind, what its decoder has and this one does not
    (`decoder_spec`), and an unknown change.
    """
    check_tokenizer(tokenizer)
    vision_config = _read_config(vision)
    if vision_config.get("model_type") not in VISION_TYPES:
        raise ValueError(f"{vision} holds a model of type {vision_config.get('model_type')!r}, expected one of {', '.join(VISION_TYPES)}")
    vision_config = vision_config.get("vision_config", vision_config) | changes.get("vision_config", {})
    vision_config["model_type"] = "siglip_vision_model"
    if image_size is not None:
        vision_config["image_size"] = image_size
    text_config = gguf_config(language) if language.suffix == ".gguf" else _read_config(language)
    text_config |= changes.get("text_config", {})
    values: dict[str, Any] = {"vision_config": vision_config, "text_config": text_config}
    values["image_token_index"] = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
    config = EagleConfig(**(IN_USE | changes | values))
    check_changes(config, changes)
    _check_patches(config)
    decoder_spec(config.text_config)
    config.force_image_size = config.tile_size
    config.text_config.eos_token_id = tokenizer.convert_tokens_to_ids(IM_END)
    config.text_config.pad_token_id = tokenizer.pad_token_id
    return config


def _check_patches(config: EagleConfig) -> None:
    """Raises ValueError, with the tile sizes that are nearest, when the patches of a tile cannot be joined to visual tokens."""
    tower = config.vision_config
    side, block = tower.image_size // tower.patch_size, round(1 / config.downsample_ratio) if config.use_pixel_shuffle else 1
    if side % block:
        low, high = ((side // block + up) * block * tower.patch_size for up in (0, 1))
        raise ValueError(
            f"the vision tower has {side} patches a side of a tile of {tower.image_size} pixels, and {block} x {block} of them become one "
            f"visual token: set image_size to {f'{low} or ' if low else ''}{high} (position embeddings are resized)"
        )


def gguf_config(path: Path) -> dict[str, Any]:
    """The configuration of a GGUF file, as transformers reads it. Raises ImportError without the package `gguf`."""
    import_gguf(path)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()


def import_gguf(path: Path) -> None:
    """Raises ImportError, with the command that installs it, when the package that reads GGUF files is missing."""
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{path} is a GGUF file, which transformers reads with the package gguf: pip install gguf") from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if folder.suffix == ".gguf":
            raise FileNotFoundError(f"{folder} is a GGUF file, which can be the language model only; name a folder of safetensors")
        several = " and more than one GGUF file; name one of them" if len(list(folder.glob("*.gguf"))) > 1 else ""
        raise FileNotFoundError(f"{folder} has no config.json{several}")
    return json.loads(file.read_text())
