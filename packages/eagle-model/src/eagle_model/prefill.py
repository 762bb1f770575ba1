"""A long prompt in chunks: the activations of a chunk are in memory at a time, in the vision tower and in the decoder.

What grows with the prompt are keys and values, and one visual token's features for each visual token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from eagle_model.modules import EaglePreTrainedModel, in_groups


def prefill_in_chunks(
    model: EaglePreTrainedModel, input_ids: Tensor, tiles: Tensor, size: int, attention_mask: Tensor | None, cache: Cache | None
) -> Any:
    """The output of the last chunk, after which `cache` holds the prompt.

    input_ids: [B, L], the whole prompt, or, with tokens in the cache, the new tokens. tiles: of the tokens that are not in the cache, in
    the order of the rows. size: tokens of a chunk in each row; the tiles of that many tokens are encoded at a time, at least one.
    attention_mask: [B, cached + new], padding on either side.
    Raises ValueError without a cache, and for tiles that are not those of the ids.
    """
    if cache is None:
        raise ValueError("a prompt in chunks needs a key/value cache: leave use_cache=True with prefill_chunk_size")
    past = int(cache.get_seq_length())
    if attention_mask is None:
        known = past + input_ids.shape[1] if past == 0 else input_ids.shape[1]
        attention_mask = torch.ones(input_ids.shape[0], known, dtype=torch.long, device=input_ids.device)
    ids = input_ids[:, past:] if input_ids.shape[1] == attention_mask.shape[1] else input_ids
    visual = ids == model.config.image_token_index
    model.check_features(int(visual.sum()), tiles.shape[0] * model.tokens_per_tile)
    features = in_groups(model.encode_tiles, tiles, max(size // model.tokens_per_tile, 1)).flatten(0, 1)
    padded = not bool(attention_mask.all())
    rows = visual.flatten().cumsum(0).view_as(visual) - 1  # which feature a visual token gets
    output: Any = None
    for start in range(0, ids.shape[1], size):
        chunk = slice(start, start + size)
        hidden = model.get_input_embeddings()(ids[:, chunk])
        place = visual[:, chunk]
        hidden[place] = features[rows[:, chunk][place].to(features.device)].to(hidden)
        seen = attention_mask[:, : past + min(start + size, ids.shape[1])] if padded else None
        output = None  # the logits of the last chunk
        output = model(inputs_embeds=hidden, attention_mask=seen, cache=cache, use_cache=True, logits_to_keep=1, return_dict=True)
    return output
