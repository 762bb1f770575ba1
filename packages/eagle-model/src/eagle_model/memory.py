"""Sizes of a model's parts for `eagle_kernels.plan_memory`, read from its configuration before anything is built."""

from eagle_kernels import DecoderShape, VisionShape
from eagle_model.configuration import EagleConfig
from eagle_model.language.spec import decoder_spec


def decoder_shape(config: EagleConfig) -> DecoderShape:
    """Sizes of the decoder."""
    spec = decoder_spec(config.text_config)
    return DecoderShape(
        hidden=spec.hidden_size,
        intermediate=spec.intermediate_size,
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab=spec.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )


def vision_shape(config: EagleConfig, tokens: int, *, frozen: bool = False) -> VisionShape:
    """Sizes of the vision tower, with the tiles of a pack of `tokens` tokens that are all visual tokens. frozen: it is not trained."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return VisionShape(
        width=vision.hidden_size,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        patches=max(1, tokens // config.tokens_per_tile) * patches,
        frozen=frozen,
        merge=patches // config.tokens_per_tile,
        positions=patches,
        patch_values=3 * vision.patch_size**2,
        heads=vision.num_attention_heads,
        used=vision.num_hidden_layers + 1 + config.select_layer if config.select_layer < 0 else config.select_layer,
    )
