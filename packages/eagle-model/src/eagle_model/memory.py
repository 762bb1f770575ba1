"""Sizes of a model's parts for `eagle_kernels.plan_memory`, read from its configuration before anything is built."""

from eagle_kernels import DecoderShape, Training, VisionShape
from eagle_model.configuration import EagleConfig
from eagle_model.language.spec import decoder_spec

FULL = Training()


def decoder_shape(config: EagleConfig, training: Training = FULL) -> DecoderShape:
    """Sizes of the decoder. training: how it is trained."""
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
        vectors=spec.vectors,
        mlp_bias=spec.mlp_bias,
        training=training,
    )


def vision_shape(config: EagleConfig, tokens: int, *, training: Training = FULL, connector: Training = FULL) -> VisionShape:
    """Sizes of the vision tower, with the tiles of a pack of `tokens` tokens that are all visual tokens.

    training, connector: how the tower and the connector are trained.
    """
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return VisionShape(
        width=vision.hidden_size,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        patches=max(1, tokens // config.tokens_per_tile) * patches,
        merge=patches // config.tokens_per_tile,
        positions=patches,
        patch_values=3 * vision.patch_size**2,
        training=training,
        connector=connector,
        heads=vision.num_attention_heads,
        used=vision.num_hidden_layers + 1 + config.select_layer if config.select_layer < 0 else config.select_layer,
    )
