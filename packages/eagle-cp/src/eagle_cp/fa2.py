"""FlashAttention-2 on packed segments: torch's own, and that of flash-attn 2. Both mask causally at the bottom right."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from eagle_cp.gradients import add_rows, rounded_gradients
from eagle_cp.segments import Segments


@functools.cache
def find(module: str, *names: str) -> Any:
    """`module` if it can be imported and has `names`, else None."""
    try:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return None
        found = importlib.import_module(module)
    except ImportError:
        return None
    return found if all(hasattr(found, name) for name in names) else None


def fa2_module() -> Any:
    return find("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward")


def _lengths(segments: Segments, device: torch.device) -> dict:
    cu_q, cu_k = segments.on(device)
    return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": segments.max_q, "max_seqlen_k": segments.max_k}


def aten_forward(q, k, v, segments: Segments, causal: bool, scale: float, out: torch.Tensor) -> torch.Tensor:
    cu_q, cu_k = segments.on(q.device)
    result, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, segments.max_q, segments.max_k, 0.0, causal, False, scale=scale
    )
    out.copy_(result)
    return lse


def aten_backward(dout, q, k, v, out, lse, segments: Segments, causal: bool, scale: float, dq, dk, dv) -> None:
    cu_q, cu_k = segments.on(q.device)
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    grads = torch.ops.aten._flash_attention_backward(
        dout.contiguous(), q, k, v, out.contiguous(), lse, cu_q, cu_k, segments.max_q, segments.max_k, 0.0, causal, seed, seed, scale=scale
    )
    for x, grad in zip((dq, dk, dv), grads):
        x.copy_(grad)


def aten_backward_wide(dout, q, k, v, out, lse, segments: Segments, causal: bool, scale: float, dq) -> Callable[..., None]:
    """One key/value head at a time, repeated for its query heads without a copy: the kernel rounds the gradient of each query head, which
    it does anyway, but not their sum."""
    group, parts = q.shape[1] // k.shape[1], [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (k, v)]
    for h in range(k.shape[1]):
        heads = slice(h * group, (h + 1) * group)
        kh, vh = (x[:, h : h + 1].expand(-1, group, -1) for x in (k, v))
        grads = [torch.empty(kh.shape, dtype=k.dtype, device=k.device) for _ in "kv"]
        given = dout[:, heads], q[:, heads], kh, vh, out[:, heads], lse[heads]
        aten_backward(*given, segments, causal, scale, dq[:, heads], *grads)
        for part, grad in zip(parts, grads):
            torch.sum(grad, 1, dtype=torch.float32, out=part[:, h])
    return functools.partial(add_rows, parts)


def fa2_forward(q, k, v, segments: Segments, causal: bool, scale: float, out: torch.Tensor) -> torch.Tensor:
    result, lse, *_ = fa2_module()._flash_attn_varlen_forward(
        q, k, v, dropout_p=0.0, softmax_scale=scale, causal=causal, **_lengths(segments, q.device)
    )
    out.copy_(result)
    return lse


def fa2_backward(dout, q, k, v, out, lse, segments: Segments, causal: bool, scale: float, dq, dk, dv) -> None:
    fa2_module()._flash_attn_varlen_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out.contiguous(),
        lse,
        dq,
        dk,
        dv,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_lengths(segments, q.device),
    )


fa2_backward_wide = functools.partial(rounded_gradients, fa2_backward)
