"""Padded batches and the key/value cache: what transformers, its Trainer and TRL pass to `forward`, and what they get back.

The decoder runs on flat hidden states [T, H]. `arrange` finds the T tokens of a batch [B, L], `Arrangement.pad` puts results back.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from eagle_cp import Layout

#: The field of a model output that holds the key/value cache: `past_key_values` before transformers 5.24, `cache` since.
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
#: Arguments that transformers passes to every model and that this one does not read, with the values that change nothing.
IGNORED_ARGUMENTS: dict[str, tuple[Any, ...]] = {"output_attentions": (False,), "output_router_logits": (False,)}


@dataclass
class EagleOutput(CausalLMOutputWithPast):
    """What `forward` returns. `loss`: 0-dim float32, with targets or labels. `logits`: [T, V] packed, [B, L, V] padded.

    In padded mode also `past_key_values` (transformers 5.24 and later call it `cache`), with use_cache; `hidden_states`, a tuple of
    [B, L, H], with output_hidden_states; `last_hidden_state` [B, L, H]. `attentions` is always None: attention weights are never formed.

    In packed mode with score_tokens: `token_losses` float32 [T] and `token_right` bool [T] (see `language.head.token_scores`). With
    token_losses: the `token_losses` of the loss, 0 where there is no target, without gradient.
    """

    last_hidden_state: Tensor | None = None
    token_losses: Tensor | None = None
    token_right: Tensor | None = None


@dataclass
class Arrangement:
    """Where the tokens of a padded batch stand. rows: [T], flat index into B * L; None: all B * L in order. positions: int [T].
    shape: (B, L).

    With layout, attention is packed, over the tokens of each row. With mask (bool [B, 1, L, K]) new tokens see these of K cached keys.
    With neither, the new tokens of every row are the last of its first `keys` cached keys, none of which is padding.
    """

    rows: Tensor | None
    positions: Tensor
    shape: tuple[int, int]
    layout: Layout | None = None
    mask: Tensor | None = None
    keys: int = 0

    def pad(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [B, L, H], zeros where the batch is padded."""
        batch, length = self.shape
        if self.rows is None:
            return hidden.view(batch, length, -1)
        padded = hidden.new_zeros(batch * length, hidden.shape[-1])
        return padded.index_copy(0, self.rows.to(hidden.device), hidden).view(batch, length, -1)


def arrange(tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None) -> Arrangement:
    """The arrangement of a batch [B, L, ...].

    attention_mask: [B, cached + L], padding on either side (default: no padding), or what `cached_mask` gives, with position_ids.
    position_ids: [B or 1, L]; default: counted along the mask. Raises ValueError for a mask of another shape, and for a row without tokens.
    """
    batch, length = tokens.shape[:2]
    if attention_mask is not None and attention_mask.ndim == 4:
        if position_ids is None:
            raise ValueError("an attention mask [B, 1, L, K] does not say where tokens stand; pass position_ids [B, L] with it")
        return Arrangement(None, position_ids.expand(batch, length).flatten(), (batch, length), mask=attention_mask)
    past = int(cache.get_seq_length()) if cache is not None else 0
    if attention_mask is not None and attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, expected {(batch, past + length)}: {past} cached and {length} new tokens"
        )
    maskless = past > 0 and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    # Waits for the device, as `generate` does after every token. Masks exclude the flash kernels.
    if maskless and (attention_mask is None or bool(attention_mask.all())):
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=tokens.device)[None]
        return Arrangement(None, position_ids.expand(batch, length).flatten(), (batch, length), keys=past + length)
    if attention_mask is None:
        attention_mask = torch.ones(batch, past + length, dtype=torch.long, device=tokens.device)
    seen = attention_mask.bool()
    if position_ids is None:
        position_ids = (seen.long().cumsum(1) - 1).clamp_min(0)[:, past:]
    counts = [] if past else seen.sum(1).tolist()
    if 0 in counts and cache is None:
        raise ValueError(f"row {counts.index(0)} of the batch has no token")
    # After a cache all new tokens run, padding or not, since few of them are padding. The first chunk of a prompt in chunks does the same,
    # where the tokens of some row only begin in a later chunk.
    whole = past > 0 or 0 in counts
    rows = None if whole or sum(counts) == batch * length else seen.flatten().nonzero().squeeze(1)
    positions = position_ids.expand(batch, length).flatten()
    arrangement = Arrangement(rows, positions if rows is None else positions[rows], (batch, length))
    if whole:
        arrangement.mask = cached_mask(seen, length, cache)
    else:
        arrangement.layout = Layout.single([0, *accumulate(counts)])
    return arrangement


def cached_mask(seen: Tensor, length: int, cache: Cache | None) -> Tensor:
    """Which keys each of `length` new tokens sees, bool [B, 1, length, K].

    seen: bool [B, cached + length], False for padding. K is cached + length, or the size of a cache of fixed size. New token i of a row
    sees the cached tokens and the new ones up to itself, except padding. Padding sees itself, since a softmax over nothing is NaN.
    """
    tokens = seen.shape[1]
    order = torch.arange(tokens, device=seen.device)
    new = order[tokens - length :, None]
    mask = ((seen[:, None, :] & (order <= new)) | (order == new))[:, None]
    if is_fixed(cache):
        assert cache is not None
        mask = F.pad(mask, (0, int(cache.get_mask_sizes(length, 0)[0]) - tokens))
    return mask


def is_fixed(cache: Cache | None) -> bool:
    """Whether the cache has a fixed size (transformers' StaticCache), so that it returns keys that are not there yet."""
    return bool(getattr(cache, "is_compileable", False))


def refuse_unknown(given: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Raise TypeError for arguments that nothing reads, except those whose value changes nothing."""
    unknown = {name for name, value in given.items() if value is not None and value not in IGNORED_ARGUMENTS.get(name, ())} - set(known)
    unknown.discard("cache_position")  # positions follow from the attention mask and the cache
    if "output_attentions" in unknown:
        raise TypeError("output_attentions: attention weights are never formed by the kernels that this model uses; leave it out")
    if unknown:
        raise TypeError(f"forward has no argument {', '.join(sorted(unknown))}; its docstring lists what packed and padded mode take")


class RunsPadded(Protocol):
    """A model that gives hidden states of padded batches."""

    @property
    def run_padded(self) -> "Callable[..., tuple[Arrangement, EagleOutput]]": ...


class Backbone:
    """The model without its head: called with the arguments of `forward`'s padded mode, gives `last_hidden_state` and no logits.

    TRL and reward models call it as `model.base_model`. It holds no parameters and is not a module.
    """

    _tp_plan = _pp_plan = None

    def __init__(self, model: RunsPadded) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> EagleOutput:
        for unread in ("return_dict", "mm_token_type_ids"):
            kwargs.pop(unread, None)
        known = signature(self.model.run_padded).parameters
        refuse_unknown(kwargs, known)
        return self.model.run_padded(input_ids, attention_mask, **{name: kwargs[name] for name in kwargs if name in known})[1]
