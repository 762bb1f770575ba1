"""The configuration of the model, read from and written to files as the released Eagle 2.5 checkpoints have them.

Defaults are those of the released files, where an absent field means its default. New models take theirs from `eagle_model.presets`.
"""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, SiglipVisionConfig

from eagle_model import sizes
from eagle_model.language.spec import FAMILIES, unknown_family
from eagle_model.sizes import MODEL_TYPE

ARCHITECTURE = "Eagle2_5_VLForConditionalGeneration"

#: Language models by the class that `text_config.architectures[0]` names.
LANGUAGE_MODELS = {family.architecture: model_type for model_type, family in FAMILIES.items()}


class EagleConfig(PretrainedConfig):
    """Configuration of an Eagle 2.5 model.

    vision_config: a `SiglipVisionConfig` or its dict. text_config: the configuration of a family in `eagle_model.language.spec`
    (`Qwen2Config`, `Qwen3Config`, `LlamaConfig`, `MistralConfig`, `SmolLM3Config`), or its dict with `architectures` (or `model_type`);
    older files call it `llm_config`.
    select_layer: -1 is the last layer after the post-layernorm; -2, -4, ... are the hidden states of an earlier layer, as they are.
    force_image_size: side of a tile in pixels; None means that of the vision tower.
    downsample_ratio: 0.5 joins 2x2 patches to one token. use_pixel_shuffle: False leaves every patch a token.
    mlp_connector_layers: 2 (LayerNorm, Linear, GELU, Linear) or 1 (Linear).
    min_dynamic_tiles, max_dynamic_tiles: bounds of the tiling grid, 1 and 6 when absent (also read and written as `min_dynamic_patch`,
    `max_dynamic_patch`; where both are given, `_tiles` holds).
    initializer_range, patch_initializer_range: standard deviations of random weights, of language model and connector, and of the tower's
    patch embedding; None means the language model's own, and SigLIP's 1 / sqrt(3 * patch_size^2).
    tie_word_embeddings: whether the head shares the embedding's weight. The value in `text_config` comes first, then the one at the top
    level.

    Raises ValueError for an unknown language or vision model.
    """

    #: Released folders name code of their own here, which is never used. TRL reads the attribute of every configuration.
    auto_map = {}  # noqa: RUF012
    model_type = MODEL_TYPE
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": AutoConfig}  # type: ignore[assignment] # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    select_layer: int = -4
    force_image_size: int | None = None
    downsample_ratio: float = 0.5
    use_pixel_shuffle: bool = True
    mlp_connector_layers: int = 2
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    # None marks an absent field; after __post_init__ these are numbers.
    min_dynamic_tiles: int = None  # type: ignore[assignment]
    max_dynamic_tiles: int = None  # type: ignore[assignment]
    image_token_index: int | None = None
    tie_word_embeddings: bool | None = None
    template: str | None = None
    loss_version: str = "v1"
    initializer_range: float | None = None
    patch_initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        older = kwargs.pop("llm_config", None)
        text = self.text_config if self.text_config is not None else older
        said_by_text = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        said = next((value for value in (said_by_text, self.tie_word_embeddings) if value is not None), None)
        self.text_config = _text_config(text)
        self.vision_config = _vision_config(self.vision_config)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings if said is None else said)
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        # Readers of InternVL's kind spell the bounds of the grid differently.
        for name, default in (("min_dynamic", 1), ("max_dynamic", 6)):
            given = (getattr(self, f"{name}_tiles"), kwargs.pop(f"{name}_patch", None), default)
            setattr(self, f"{name}_tiles", next(value for value in given if value is not None))
        # What a file says about the code that it was written for does not hold here: the attention kernel is chosen when a model runs.
        for name in ("auto_map", "_attn_implementation", "_attn_implementation_autoset"):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers. Raises ValueError when the file describes a model of another type, before anything is built from it."""
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = values.get("model_type", MODEL_TYPE)
        if found != MODEL_TYPE:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found!r}, expected {MODEL_TYPE!r} (Eagle 2.5); "
                "name the folder of an Eagle checkpoint, or build a new model from a vision tower and a language model with "
                "eagle_model.from_pretrained_parts"
            )
        return values, kwargs

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return sizes.tile_size(self)

    @property
    def tokens_per_tile(self) -> int:
        """`k`: visual tokens of one tile."""
        return sizes.tokens_per_tile(self)

    def tie(self) -> None:
        """Tie the head to the embedding, in `text_config` and at the top level."""
        self.tie_word_embeddings = self.text_config.tie_word_embeddings = True

    def to_dict(self) -> dict[str, Any]:
        """The configuration in the spelling of the released files, with both names of fields that have two."""
        result = super().to_dict()
        result["architectures"] = [ARCHITECTURE]
        result["min_dynamic_patch"] = self.min_dynamic_tiles
        result["max_dynamic_patch"] = self.max_dynamic_tiles
        for name in ("initializer_range", "patch_initializer_range"):
            if result.get(name) is None:
                result.pop(name, None)
        return result

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: no generic fields, every field of the two parts, and the spellings that other loaders read."""
        result = super().to_diff_dict()
        parts = {"text_config": self.text_config, "vision_config": self.vision_config}
        for name, part in parts.items():
            generic = {*PretrainedConfig().to_dict(), "transformers_version"} - {"architectures"}
            # None is written where it is not the default, as in Mistral's sliding_window.
            defaults = type(part)().to_dict()
            result[name] = {
                key: value
                for key, value in part.to_dict().items()
                if key not in generic and (value is not None or defaults.get(key) is not None)
            }
            result[name]["model_type"] = part.model_type
            if self.dtype is not None:
                result[name]["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        result["text_config"]["tie_word_embeddings"] = self.tie_word_embeddings
        result["text_config"].update(legacy_rope(self.text_config.rope_parameters))
        if self.dtype is not None:
            result["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        return result


def legacy_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which loaders older than transformers 5 read instead of `rope_parameters`."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"]} | ({} if plain else {"rope_scaling": scaling})


def _text_config(given: Any) -> Any:
    if given is None:
        given = {"architectures": ["Qwen2ForCausalLM"]}
    if isinstance(given, dict):
        named, own = (given.get("architectures") or [None])[0], given.get("model_type", "")
        model_type = LANGUAGE_MODELS.get(named) if named else own
        if model_type is None or model_type not in LANGUAGE_MODELS.values():
            raise ValueError(f"text_config: {unknown_family(named or own, own)}")
        given = CONFIG_MAPPING[model_type](
            **{key: value for key, value in given.items() if key not in ("model_type", "_attn_implementation")}
        )
    if given.model_type not in LANGUAGE_MODELS.values():
        raise ValueError(f"text_config: {unknown_family(type(given).__name__, given.model_type)}")
    if not given.architectures:
        given.architectures = [name for name, model_type in LANGUAGE_MODELS.items() if model_type == given.model_type]
    return given


def _vision_config(given: Any) -> SiglipVisionConfig:
    if given is None:
        given = {}
    if isinstance(given, dict):
        if given.get("model_type", "siglip_vision_model") != "siglip_vision_model":
            raise ValueError(f"vision_config.model_type is {given['model_type']!r}; only 'siglip_vision_model' is known")
        given = SiglipVisionConfig(**{key: value for key, value in given.items() if key not in ("model_type", "_attn_implementation")})
    if not isinstance(given, SiglipVisionConfig):
        raise ValueError(f"vision_config is a {type(given).__name__}; it must be a SiglipVisionConfig")
    # The pooling head is never computed, and never written: loaders of this layout reject its tensors.
    given.vision_use_head = False
    return given


def register_config() -> None:
    """Make `AutoConfig` know `eagle_2_5_vl`."""
    AutoConfig.register(MODEL_TYPE, EagleConfig, exist_ok=True)


register_config()
