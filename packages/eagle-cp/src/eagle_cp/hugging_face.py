"""Attention for Hugging Face models: a function in transformers' own registry, so that no model is changed.

    register_attention()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="eagle_cp")
    positions = layout.shard(layout.position_ids())
    model(input_ids=layout.shard(ids)[None], position_ids=positions[None], use_cache=False, eagle_layout=layout)

Models pass unknown keyword arguments on to their attention function; the layout is such an argument. The batch dimension must be 1: pack a
batch into one sequence."""

from __future__ import annotations

import warnings
from weakref import WeakSet

import torch
from torch import Tensor

from eagle_cp.attention import attention
from eagle_cp.layout import Layout

_checked: WeakSet[torch.nn.Module] = WeakSet()
"""First layers whose positions were looked at."""


def register_attention(name: str = "eagle_cp") -> None:
    """Adds `name` to transformers' attention and mask registries. Needs transformers (`pip install 'eagle-cp[transformers]'`), else
    ImportError is raised. Models stay as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, hugging_face_attention)  # pyright: ignore[reportUnknownMemberType]
    AttentionMaskInterface.register(name, _no_mask)  # pyright: ignore[reportUnknownMemberType]


def _no_mask(*_: object, attention_mask: Tensor | None = None, **__: object) -> None:
    """No mask: documents and causality come from the layout. A mask of ones is accepted (checking it waits for the device); a mask that
    excludes tokens raises ValueError."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"eagle_cp attention: attention_mask excludes {int((attention_mask == 0).sum())} of {attention_mask.numel()} tokens; masks"
            " are not supported, because documents come from the layout; pack the batch without padding and pass no attention_mask"
        )


def hugging_face_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    eagle_layout: Layout | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention with transformers' calling convention: `query: [1, Hq, T, D]`, `key`, `value: [1, Hk, T, D]` -> `[1, T, Hq, D]`.

    Raises ValueError for what can't be computed exactly: a mask, dropout, a sliding window shorter than the longest document, soft-capped
    scores, attention sinks, a cache. Warns once for a model whose positions are not those of the rank's tokens."""
    if eagle_layout is None:
        raise ValueError("eagle_cp attention: no layout; call the model with eagle_layout=Layout.single(...) or Layout.build(...)")
    if attention_mask is not None:
        raise ValueError("eagle_cp attention: masks are not supported, documents come from the layout; pass no attention_mask")
    if dropout:
        raise ValueError(f"eagle_cp attention: dropout {dropout} is not supported; set attention_dropout to 0")
    if sliding_window is not None and sliding_window < eagle_layout.longest:
        raise ValueError(
            f"eagle_cp attention: a sliding window of {sliding_window} is not supported for documents of {eagle_layout.longest}"
        )
    if softcap is not None or s_aux is not None:
        raise ValueError("eagle_cp attention: soft-capped scores and attention sinks are not supported")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"eagle_cp attention: query {tuple(query.shape)}, key {tuple(key.shape)}; pack the batch into one sequence and call with"
            " use_cache=False"
        )
    if getattr(module, "layer_idx", 0) == 0 and module not in _checked and not torch.compiler.is_compiling():
        _checked.add(module)
        _check_positions(position_ids, eagle_layout)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attention(q, k, v, eagle_layout, causal=causal, scale=scaling)
    return out[None], None


def _check_positions(given: Tensor | None, layout: Layout) -> None:
    """Models count positions from 0 when they get none, which on a part of a pack is wrong without an error.

    A warning, because positions may be chosen on purpose, and because an error of one rank would leave the others in a collective.
    """
    alone = layout.mesh.size == 1 and not layout.prefixes  # positions from 0 then differ from a document's by a constant
    if given is None or given.ndim != 2 or given.shape[1] != layout.local or alone:
        return
    tokens = layout.local_tokens()
    held = tokens >= 0  # the others are pad rows
    tokens, positions = tokens[held], given[0].cpu()[held]
    expected = layout.position_ids()[tokens]
    if torch.equal(positions, expected) or (not layout.prefixes and torch.equal(positions, tokens)):
        return
    row = int((positions != expected).nonzero()[0])
    warnings.warn(
        f"eagle_cp attention: position_ids are not those of this rank's tokens (token {int(tokens[row])} of the pack has position "
        f"{int(positions[row])}, in its document {int(expected[row])}); call the model with "
        "position_ids=layout.shard(layout.position_ids())[None]",
        stacklevel=2,
    )
