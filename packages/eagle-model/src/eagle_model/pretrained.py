"""A new Eagle from a pretrained vision tower and a pretrained language model; only the connector starts from random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eagle_model.checkpoint import HEAD, read_tensors
from eagle_model.configuration import EagleConfig
from eagle_model.eagle import EagleForConditionalGeneration
from eagle_model.presets import IN_USE, check_changes
from eagle_model.prompt import IM_END, IMG_CONTEXT
from eagle_model.tokenizer import check_tokenizer

_POSITIONS = "vision_model.vision_model.embeddings.position_embedding.weight"
#: `model_type` of configurations whose vision tower is read: both towers of one model, or the vision tower alone.
VISION_TYPES = ("siglip", "siglip_vision_model")
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]


def from_pretrained_parts(
    vision: str | Path,
    language: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> EagleForConditionalGeneration:
    """A model of two checkpoints: a SigLIP or SigLIP2 (whole or vision model alone) and a language model of a known family.

    vision, language: folders with `config.json` and safetensors, or names on the Hugging Face hub (`google/siglip2-so400m-patch14-384`),
    which are downloaded unless they are in the cache.
    tokenizer: the language model's, with Eagle's tokens (`add_eagle_tokens`). The vocabulary grows to it where it must; new rows are the
    mean of the old ones. image_size: tile side in pixels; positions are resized (bicubic) when it is not the tower's own. changes: other
    fields of `EagleConfig`.

    Raises FileNotFoundError for a folder or hub name that is not there or cannot be reached, and ValueError for a model of another kind,
    an unknown change, and tensors that are missing or of another shape.
    """
    check_tokenizer(tokenizer)
    vision, language = checkpoint_folder(vision), checkpoint_folder(language)
    vision_config = _read_config(vision)
    if vision_config.get("model_type") not in VISION_TYPES:
        raise ValueError(f"{vision} holds a model of type {vision_config.get('model_type')!r}, expected one of {', '.join(VISION_TYPES)}")
    vision_config = vision_config.get("vision_config", vision_config)
    vision_config["model_type"] = "siglip_vision_model"
    if image_size is not None:
        vision_config["image_size"] = image_size
    values: dict[str, Any] = {"vision_config": vision_config, "text_config": _read_config(language)}
    values["image_token_index"] = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
    config = EagleConfig(**(IN_USE | values | changes))
    check_changes(config, {name: value for name, value in changes.items() if name not in values})
    config.force_image_size = config.tile_size
    model = EagleForConditionalGeneration(config)
    model.to(dtype)  # type: ignore[arg-type]
    _copy_tensors(model, vision, language)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # type: ignore[arg-type, operator]
        model.resize_token_embeddings(len(tokenizer))
    # Answers end at <|im_end|>, whatever the tokenizer's own end token is.
    ids = {"eos_token_id": tokenizer.convert_tokens_to_ids(IM_END), "pad_token_id": tokenizer.pad_token_id}
    for name, value in ids.items():
        setattr(config.text_config, name, value)
        setattr(model.generation_config, name, value)
    return model


def checkpoint_folder(name: str | Path) -> Path:
    """The local folder of a checkpoint: `name` itself, or the download of a model on the Hugging Face hub (its cache when offline).

    Raises FileNotFoundError, saying whether a folder, the model on the hub or the network is missing.
    """
    if (folder := Path(name)).is_dir():
        return folder
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{name} is not a folder; name a folder with config.json and safetensors, or a model on the hub (owner/name)"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{name} is neither a folder here nor a model that the Hugging Face hub shows to you") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is not a folder here, is not in the Hugging Face cache, and the hub cannot be reached from this machine "
            f"({type(error).__name__}); fetch it where there is a network with: hf download {name} --local-dir FOLDER, and name that folder"
        ) from error


def resize_positions(positions: Tensor, count: int) -> Tensor:
    """Position embeddings of a square grid of patches for another square grid: [n, d] -> [count, d], bicubic.

    Raises ValueError when either is not a square.
    """
    if positions.shape[0] == count:
        return positions
    old, new = (round(number**0.5) for number in (positions.shape[0], count))
    if old * old != positions.shape[0] or new * new != count:
        raise ValueError(f"positions of {positions.shape[0]} patches cannot become {count}: both must be squares")
    grid = positions.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=new < old)
    return grid.permute(0, 2, 3, 1).reshape(count, -1).to(positions.dtype)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        other = next((f"; it holds {path.name}, but only safetensors are read" for path in folder.glob("*.gguf")), "")
        raise FileNotFoundError(f"{folder} has no config.json{other}")
    return json.loads(file.read_text())


def _copy_tensors(model: EagleForConditionalGeneration, vision: Path, language: Path) -> None:
    """Copy the tensors of both checkpoints into the model. Raises ValueError for tensors that are missing or of another shape."""
    own = dict(model.named_parameters(remove_duplicate=False))
    left = {name for name in own if not name.startswith("mlp1.")}
    if model.config.tie_word_embeddings:
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


def _vision_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in read_tensors(folder):
        part = name.rsplit("vision_model.", 1)[-1]
        if part.startswith(("embeddings.", "encoder.", "post_layernorm.")):
            yield f"vision_model.vision_model.{part}", tensor


def _language_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in read_tensors(folder):
        yield f"language_model.{name}", tensor
