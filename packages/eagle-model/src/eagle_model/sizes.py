"""Sizes of a model as its configuration states them, without the configuration classes of transformers, which import torch.

`EagleConfig` fills in every default; `stated_sizes` reads only what is written, so that a run can be planned in a process without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")

MODEL_TYPE = "eagle_2_5_vl"
"""`model_type` in config.json."""


@dataclass(frozen=True)
class VisionSizes:
    """Side of an image and of a patch in pixels. Sizes of the layers are None where they are not stated."""

    image_size: int
    patch_size: int
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None


@dataclass(frozen=True)
class TextSizes:
    """max_position_embeddings: positions that the language model was made for. Sizes of the layers are None where they are not stated."""

    max_position_embeddings: int
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class ModelSizes:
    """What planning needs of an `EagleConfig`, under the same names."""

    vision_config: VisionSizes
    text_config: TextSizes
    force_image_size: int | None
    downsample_ratio: float
    use_pixel_shuffle: bool
    select_layer: int = -4
    mlp_connector_layers: int = 2

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return tile_size(self)

    @property
    def tokens_per_tile(self) -> int:
        """`k`: visual tokens of one tile."""
        return tokens_per_tile(self)


def tile_size(config: Any) -> int:
    """Side of a tile in pixels, of an `EagleConfig` or `ModelSizes`."""
    return config.force_image_size or config.vision_config.image_size


def tokens_per_tile(config: Any) -> int:
    """`k`, the visual tokens of one tile, of an `EagleConfig` or `ModelSizes`."""
    side = tile_size(config) // config.vision_config.patch_size
    return round(side * config.downsample_ratio) ** 2 if config.use_pixel_shuffle else side**2


def stated_sizes(values: Mapping[str, Any]) -> ModelSizes | None:
    """Sizes from keyword arguments of `EagleConfig`, or the content of a config.json; None when one of a part is not written there."""
    vision, text = values.get("vision_config"), values.get("text_config", values.get("llm_config"))
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        return None
    numbers = [vision.get("image_size"), vision.get("patch_size"), text.get("max_position_embeddings")]
    if not all(isinstance(number, int) for number in numbers):
        return None
    return ModelSizes(
        _stated(VisionSizes, vision),
        _stated(TextSizes, text),
        force_image_size=values.get("force_image_size"),
        downsample_ratio=values.get("downsample_ratio", 0.5),
        use_pixel_shuffle=values.get("use_pixel_shuffle", True),
        select_layer=values.get("select_layer", -4),
        mlp_connector_layers=values.get("mlp_connector_layers", 2),
    )


def _stated(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})  # pyright: ignore[reportArgumentType]
