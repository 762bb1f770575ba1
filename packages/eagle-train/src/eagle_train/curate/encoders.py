"""Encoders of frames behind one function: uint8 [n, s, s, 3] -> float32 [n, d]."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eagle_train.config import ConfigError

GROUP = "eagle_train.encoders"
"""Entry points of encoders: functions `(device: str) -> Encoder`."""


@dataclass(frozen=True)
class Encoder:
    """size: side in pixels of the square frames that `encode` takes (frames are resized to it, not cropped).

    encode: uint8 [n, size, size, 3] -> float32 [n, d]. The vectors are normalised by the caller.
    """

    size: int
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def fingerprint(name: str) -> str:
    """What distinguishes an encoder from others: its name, and for a folder its configuration and the sizes and times of its weights.

    Raises ConfigError when the folder is not a model, or no encoder is named.
    """
    if not name:
        raise ConfigError("embed.encoder is not given; name the folder of a SigLIP, CLIP or Eagle model, or module:function")
    folder = Path(name)
    if not folder.is_dir():
        _factory(name)
        return name
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))]
    if not stamps or not (folder / "config.json").is_file():
        raise ConfigError(f"embed.encoder: {folder} has no config.json with safetensors weights; name the folder of a model")
    return json.dumps([(folder / "config.json").read_text(encoding="utf-8"), stamps])


def load_encoder(name: str, device: str) -> Encoder:
    """The encoder that `embed.encoder` names, on a device. Raises ConfigError; no remote code is run and nothing is downloaded."""
    folder = Path(name)
    if not folder.is_dir():
        encoder = _factory(name)(device)
        if not isinstance(encoder, Encoder):
            raise ConfigError(f"embed.encoder: {name} returned {type(encoder).__name__}, expected eagle_train.curate.encoders.Encoder")
        return encoder
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"embed.encoder: {folder / 'config.json'} can't be read: {error}") from error
    return (_eagle if "downsample_ratio" in config else _hugging_face)(folder, config, device)


def _factory(name: str) -> Callable[[str], Any]:
    module, colon, function = name.partition(":")
    if colon:
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"embed.encoder: {name} can't be imported: {error}") from error
    for point in entry_points(group=GROUP):
        if point.name == name:
            return point.load()
    known = sorted(point.name for point in entry_points(group=GROUP))
    raise ConfigError(
        f"embed.encoder: {name} is not a folder, not module:function, and not an entry point of {GROUP} "
        f"({', '.join(known) or 'none installed'})"
    )


def _hugging_face(folder: Path, config: dict[str, Any], device: str) -> Encoder:
    """SigLIP, CLIP, or the vision half of one, through transformers. Vectors are those that a whole model compares with texts."""
    import torch
    from transformers import AutoModel

    kind = str(config.get("model_type", ""))
    if not kind.startswith(("siglip", "clip")):
        raise ConfigError(f"embed.encoder: {folder} has model_type {kind!r}; known are siglip, clip (and their vision halves) and Eagle")
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval().to(device)
    size = int(config.get("vision_config", config).get("image_size", 224))
    mean, std = _normalisation(folder, kind)
    shift, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))

    @torch.inference_mode()
    def encode(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float().div_(255).sub_(shift).div_(scale)
        output = model.get_image_features(pixel_values=pixels) if hasattr(model, "get_image_features") else model(pixel_values=pixels)
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        return features.float().cpu().numpy()

    return Encoder(size, encode)


def _normalisation(folder: Path, kind: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the colours: of the folder's preprocessor_config.json, else those that the family was trained with."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        if "image_mean" in content and "image_std" in content:
            return content["image_mean"], content["image_std"]
    if kind.startswith("siglip"):
        return [0.5] * 3, [0.5] * 3
    return [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def _eagle(folder: Path, config: dict[str, Any], device: str) -> Encoder:
    """The vision tower of an Eagle checkpoint: the mean of its patches. Only the tower's weights are read."""
    import torch

    from eagle_model import EagleConfig
    from eagle_model.checkpoint import read_tensors
    from eagle_model.vision.siglip import VisionModel

    eagle = EagleConfig.from_pretrained(folder)
    tower = VisionModel(eagle.vision_config, eagle.select_layer).eval()
    prefix = "vision_model."
    state = {key.removeprefix(prefix): tensor.float() for key, tensor in read_tensors(folder) if key.startswith(prefix)}
    missing = tower.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise ConfigError(f"embed.encoder: {folder} lacks weights of its vision tower: {', '.join(missing[:3])}")
    tower.to(device)

    @torch.inference_mode()
    def encode(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return tower(torch.from_numpy(frames).to(device)).mean(dim=1).float().cpu().numpy()

    return Encoder(eagle.tile_size, encode)
