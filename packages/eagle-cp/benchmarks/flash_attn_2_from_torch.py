"""The functions of flash-attn 2 that rivals import, implemented with the FlashAttention-2 kernels inside torch, so that rivals run without
that package, which must be built.

`install()` adds them to `sys.modules` of this process. For benchmarks only.
"""

from __future__ import annotations

import sys
import types

import torch

aten = torch.ops.aten


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    out, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale)
    return out, lse, None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
    alibi_slopes=None, deterministic=False, rng_state=None,
):  # fmt: skip
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        dout.contiguous(), q, k, v, out.contiguous(), softmax_lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, seed, seed,
        scale=softmax_scale,
    )  # fmt: skip
    for x, grad in zip((dq, dk, dv), grads):
        x.copy_(grad)


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left=-1,
    window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
):  # fmt: skip
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=softmax_scale
    )
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None,
):  # fmt: skip
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        dout.contiguous(), q, k, v, out.contiguous(), softmax_lse.contiguous(), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
        causal, seed, seed, scale=softmax_scale,
    )  # fmt: skip
    for x, grad in zip((dq, dk, dv), grads):
        x.copy_(grad)


def install() -> None:
    import flash_attn  # installed by flash-attn-4

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    for function in (_flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward):
        setattr(interface, function.__name__, function)
    interface.flash_attn_func = flash_attn.flash_attn_func = None  # imported by rivals, not called
    flash_attn.__version__ = "2.8.0"
    flash_attn.flash_attn_interface = interface
    sys.modules[interface.__name__] = interface
    # The Hugging Face adapter of ring-flash-attn can't be imported with transformers 5; its attention functions do not need it.
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules[adapters.__name__] = adapters
