"""The models of the measured steps, and their packs. `small`: tiny sizes, for a machine without a GPU."""

from collections.abc import Callable
from typing import Any

import torch

from eagle_model import EagleForConditionalGeneration, PackedBatch, preset

TEXT = 2048
"""Text tokens of `one_sequence`."""
SMALL_VISION = {"image_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
SMALL_TEXT = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}  # fmt: skip


def described(layers: int = 28, *, small: bool = False) -> Any:
    """The configuration of the 8B model with this many decoder layers."""
    if small:
        return preset("tiny", image_token_index=399, vision_config=SMALL_VISION, text_config=SMALL_TEXT)
    return preset("8b", image_token_index=151665, text_config={"num_hidden_layers": layers})


def make(config: Any, dtype: torch.dtype, kind: Callable[[Any], Any] = EagleForConditionalGeneration, device: str = "cuda") -> Any:
    """A model with random weights, made on the device: a GPU fills 8 billion values in a second."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).train()
    finally:
        torch.set_default_dtype(before)


def one_sequence(config: Any, tokens: int, device: str = "cuda") -> PackedBatch:
    """One sequence of visual tokens and TEXT text tokens, which have the labels."""
    ids = torch.randint(0, config.image_token_index, (tokens,))
    ids[:-TEXT] = config.image_token_index
    targets = torch.full((tokens,), -100)
    targets[-TEXT:] = torch.randint(0, config.text_config.vocab_size, (TEXT,))
    return _pack(config, ids, targets, torch.arange(tokens), (0, tokens), (), device)


def questions(config: Any, tokens: int, number: int, each: int = 256, device: str = "cuda") -> PackedBatch:
    """`number` rows about one video of `tokens` visual tokens, with `each` tokens of text and labels a row; several make a tree."""
    text = number * each
    ids = torch.cat([torch.full((tokens,), config.image_token_index), torch.randint(0, config.image_token_index, (text,))])
    targets = torch.full((tokens + text,), -100)
    targets[tokens:] = torch.randint(0, config.text_config.vocab_size, (text,))
    targets[tokens::each] = -100  # the first token of a branch follows the prefix
    positions = torch.cat([torch.arange(tokens), *[torch.arange(tokens, tokens + each)] * number])
    if number == 1:
        return _pack(config, ids, targets, positions, (0, tokens + text), (), device)
    borders = (0, *range(tokens, tokens + text + 1, each))
    return _pack(config, ids, targets, positions, borders, (-1, *[0] * number), device)


def _pack(
    config: Any,
    ids: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor,
    borders: tuple[int, ...],
    prefixes: tuple[int, ...],
    device: str,
) -> PackedBatch:
    """Random tiles for the ids of visual tokens, and every label with the weight 1."""
    visual, kept = (ids == config.image_token_index).nonzero().squeeze(1), int((targets >= 0).sum())
    shape = (len(visual) // config.tokens_per_tile, config.tile_size, config.tile_size, 3)
    return PackedBatch(
        input_ids=ids.to(device),
        targets=targets.to(device),
        position_ids=positions.to(device),
        token_weights=torch.ones(len(ids), device=device),
        cu_seqlens=borders,
        tiles=torch.randint(0, 256, shape, device=device, dtype=torch.uint8),
        visual_index=visual.to(device),
        num_kept=kept,
        label_weight=float(kept),
        denominator=torch.tensor(float(kept), device=device),
        prefixes=prefixes,
    )
