"""Attention of new tokens over a key/value cache, without gradients: chunks of a long prompt, and the next token of an answer.

There is no mask in memory: one of 8192 queries over 131072 keys would have 1 GiB, and most kernels turn it into a bias of their dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_cp.backends import choose
from eagle_cp.kernels import torch_flash
from eagle_cp.segments import Segments, score_factor


def cached_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """`q: [B, L, Hq, D]`, `k`, `v: [B, K, Hk, D]` (any strides) -> `[B, L, Hq, D]`.

    The L queries of a row are the last of its K keys: query i sees the keys up to `K - L + i`. No key is padding.
    scale: factor of the scores, finite and above 0; default: `D ** -0.5`.
    backend: a name in `eagle_cp.backends.KERNELS` for L > 1; default: the fastest that can run. One query has no causal mask and little
        arithmetic; it takes torch's kernel, which shares the keys of a row among many multiprocessors.

    Raises ValueError for shapes that do not fit, and when no kernel can run."""
    fits = q.ndim == k.ndim == 4
    batch, length, heads, dim = q.shape if fits else (0, 0, 0, 0)
    if not fits or k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim or k.shape[1] < length or heads % k.shape[2]:
        raise ValueError(
            f"cached_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected [B, L, Hq, D] and twice [B, K, Hk, D]"
            " with L <= K and Hq a multiple of Hk"
        )
    factor = score_factor("cached_attention", scale, dim)
    if length == 1:
        return _one_query(q, k, v, factor)
    keys = k.shape[1]
    segments = Segments(range(0, (batch + 1) * length, length), range(0, (batch + 1) * keys, keys))
    kernel = choose(q.device, q.dtype, dim, True, backend, segments)
    out = torch.empty((batch * length, heads, dim), dtype=q.dtype, device=q.device)
    kernel.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), segments, True, factor, out)
    return out.view(batch, length, heads, dim)


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if torch_flash.unsupported(q.device, q.dtype, q.shape[3], False) is None:
        # Called by its name: torch may prefer cuDNN, which plans anew for every number of keys.
        return torch.ops.aten._flash_attention_forward(q, k, v, None, None, 1, k.shape[1], 0.0, False, False, scale=scale)[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
