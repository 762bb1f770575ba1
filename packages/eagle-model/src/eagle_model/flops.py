"""FLOPs of one forward pass, by what they grow with: tokens, pairs of tokens, labels and tiles. Read from a configuration, without torch.

A multiply-add is 2 FLOPs. Norms, activations, rotary positions and the embedding are left out: together below 1 % of the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class ForwardFlops(NamedTuple):
    """FLOPs of the forward pass.

    token: linear layers of the decoder, for one token. pair: attention of all decoder layers, for one query and one key that it sees (a
    sample of n tokens has n (n + 1) / 2 such pairs). label: the head, for one token with a label (others are not multiplied). tile: the
    vision tower, for one tile. connector: the connector, for one tile. tile_linear: the part of `tile` in the linear layers of the tower's
    layers.
    """

    token: float
    pair: float
    label: float
    tile: float
    connector: float
    tile_linear: float


def forward_flops(config: Any) -> ForwardFlops | None:
    """FLOPs of the model that an `EagleConfig` or `ModelSizes` describes; None when `ModelSizes` does not state a size."""
    vision, text = config.vision_config, config.text_config
    stated = (
        *(text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads, text.vocab_size),
        *(vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers),
    )
    if not all(isinstance(size, int) for size in stated):
        return None
    hidden, inner, layers, heads, vocab, width, wide, depth = stated
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head = getattr(text, "head_dim", None) or hidden // heads
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    used = depth + 1 + config.select_layer if config.select_layer < 0 else config.select_layer
    patches = (config.tile_size // vision.patch_size) ** 2
    linear = used * (4 * width**2 + 2 * width * wide)
    of_patch = linear + used * 2 * patches * width + 3 * vision.patch_size**2 * width
    tokens = config.tokens_per_tile
    joined = patches // tokens * width
    connector = joined * hidden + (hidden**2 if config.mlp_connector_layers == 2 else 0)
    return ForwardFlops(
        token=2.0 * layers * (attention + 3 * hidden * inner),
        pair=4.0 * layers * heads * head,
        label=2.0 * hidden * vocab,
        tile=2.0 * patches * of_patch,
        connector=2.0 * tokens * connector,
        tile_linear=2.0 * patches * linear,
    )
