"""A new Eagle from a pretrained vision tower and a pretrained language model; only the connector starts from random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_model.checkpoint import EMBEDDING, HEAD, read_tensors
from eagle_model.configuration import EagleConfig
from eagle_model.eagle import EagleForConditionalGeneration
from eagle_model.presets import IN_USE, check_changes
from eagle_model.prompt import IM_END, IMG_CONTEXT
from eagle_model.tokenizer import check_tokenizer

_POSITIONS = "vision_model.vision_model.embeddings.position_embedding.weight"


def assemble(
    vision: str | Path,
    language: str | Path,
    tokenizer: Any,
    *,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> EagleForConditionalGeneration:
    """The model of two local folders of safetensors: a SigLIP or SigLIP2 (whole or vision model alone), and a Qwen2, Qwen3 or Llama.

    tokenizer: the language model's, with Eagle's tokens (`add_eagle_tokens`); the vocabulary grows to it where it must, new rows being the
    mean of the old ones. image_size: tile side in pixels; positions are resized (bicubic) when it isn't the tower's own. changes: other
    fields of `EagleConfig`. Raises ValueError naming tensors that are missing or of another shape, or an unknown change, and
    FileNotFoundError.
    """
    check_tokenizer(tokenizer)
    vision_config = json.loads((Path(vision) / "config.json").read_text())
    vision_config = vision_config.get("vision_config", vision_config)
    vision_config["model_type"] = "siglip_vision_model"
    text_config = json.loads((Path(language) / "config.json").read_text())
    if image_size is not None:
        vision_config["image_size"] = image_size
    values: dict[str, Any] = {"vision_config": vision_config, "text_config": text_config}
    values["image_token_index"] = int(tokenizer.convert_tokens_to_ids(IMG_CONTEXT))
    config = EagleConfig(**(IN_USE | values | changes))
    check_changes(config, {name: value for name, value in changes.items() if name not in values})
    config.force_image_size = config.tile_size
    model = EagleForConditionalGeneration(config)
    model.to(dtype)  # type: ignore[arg-type]

    own = dict(model.named_parameters(remove_duplicate=False))
    left = {name for name in own if not name.startswith("mlp1.")}
    if config.tie_word_embeddings:
        left.discard(HEAD)
    for name, tensor in (*_vision_tensors(vision), *_language_tensors(language)):
        if name not in left:
            continue
        if name == _POSITIONS:
            tensor = resize_positions(tensor, own[name].shape[0])
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but the configuration says {tuple(own[name].shape)}")
        with torch.no_grad():
            own[name].copy_(tensor)
        left.discard(name)
    if left:
        raise ValueError(f"{len(left)} tensors are in neither {vision} nor {language}: {', '.join(sorted(left)[:4])}, ...")
    if len(tokenizer) > own[EMBEDDING].shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    # Answers end at <|im_end|>, whatever the tokenizer's own end token is.
    ids = {"eos_token_id": int(tokenizer.convert_tokens_to_ids(IM_END)), "pad_token_id": tokenizer.pad_token_id}
    for name, value in ids.items():
        setattr(config.text_config, name, value)
        setattr(model.generation_config, name, value)
    return model


def resize_positions(positions: Tensor, count: int) -> Tensor:
    """Position embeddings of a square grid of patches for another square grid: [n, d] -> [count, d], bicubic.

    Raises ValueError when either isn't a square.
    """
    if positions.shape[0] == count:
        return positions
    old, new = (round(number**0.5) for number in (positions.shape[0], count))
    if old * old != positions.shape[0] or new * new != count:
        raise ValueError(f"positions of {positions.shape[0]} patches can't become {count}: both must be squares")
    grid = positions.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=new < old)
    return grid.permute(0, 2, 3, 1).reshape(count, -1).to(positions.dtype)


def _vision_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in read_tensors(folder):
        part = name.rsplit("vision_model.", 1)[-1]
        if part.startswith(("embeddings.", "encoder.", "post_layernorm.")):
            yield f"vision_model.vision_model.{part}", tensor


def _language_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in read_tensors(folder):
        yield f"language_model.{name}", tensor
