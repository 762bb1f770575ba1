"""The rivals of every operator: plain torch, the same compiled, and public libraries where they are installed."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals import Rival


@functools.cache
def _let_quack_compile() -> None:
    """Make quack 0.6.5 work with newer CuTe DSLs.

    quack keys its compiled matmuls by everything that their epilogues refer to, and stops at unknown types: the context variables in which
    CuTe DSL 4.8.1 keeps source locations. Their names are sufficient keys, because no arithmetic depends on them.
    """
    identity = importlib.import_module("quack.gemm_runtime.identity")
    known = identity.semantic_value_key

    def key(value: Any, seen: Any) -> Any:
        try:
            return known(value, seen)
        except TypeError:
            return ("unknown", type(value).__qualname__, getattr(value, "name", ""))

    identity.semantic_value_key = key


def quack(module: str, attribute: str, wrap: Callable[[Any], Callable], name: str = "quack") -> Rival:
    """A rival made of `wrap(module.attribute)`."""

    def make() -> Callable:
        _let_quack_compile()
        return wrap(getattr(importlib.import_module(module), attribute))

    return Rival(name, make)


def torch_rivals(function: Callable) -> list[Rival]:
    return [Rival("torch", lambda: function), Rival("torch.compile", lambda: torch.compile(function))]


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Qwen2RMSNorm writes it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def eager_add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return eager_rms_norm(total, weight), total


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' apply_rotary_pos_emb, on [T, heads, D]."""

    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    cos, sin = cos[:, None], sin[:, None]
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def eager_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def eager_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def quack_rope(apply: Callable) -> Callable:
    """quack's tables hold one half, and queries and keys are two calls."""

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        half = cos.shape[-1] // 2
        return tuple(apply(x[None], cos[:, :half], sin[:, :half]) for x in (q, k))

    return run


def liger_head(function: Any) -> Callable:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        result = function.apply(hidden, weight, labels)
        return result[0] if isinstance(result, tuple) else result

    return run


RMS_NORM = [
    *torch_rivals(eager_rms_norm),
    Rival("F.rms_norm", lambda: lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6)),
    Rival("liger", lambda f: lambda x, w: f.apply(x, w, 1e-6, 0.0, "llama", False), ("liger_kernel.ops.rms_norm:LigerRMSNormFunction",)),
    quack("quack.rmsnorm", "rmsnorm", lambda f: lambda x, w: f(x, w, eps=1e-6)),
]
ADD_RMS_NORM = [
    *torch_rivals(eager_add_rms_norm),
    Rival(
        "liger",
        lambda f: lambda residual, x, w: f.apply(x, residual, w, 1e-6, 0.0, "llama", False),
        ("liger_kernel.ops.fused_add_rms_norm:LigerFusedAddRMSNormFunction",),
    ),
    quack("quack.rmsnorm", "rmsnorm", lambda f: lambda residual, x, w: f(x, w, residual=residual, eps=1e-6, prenorm=True)),
]
ROPE = [
    *torch_rivals(eager_rope),
    # Liger takes [batch, heads, tokens, D] and changes the layout itself.
    Rival(
        "liger",
        lambda f: lambda q, k, cos, sin: f.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]),
        ("liger_kernel.ops.rope:LigerRopeFunction",),
    ),
    quack("quack.rotary", "apply_rotary_emb", quack_rope),
]
SWIGLU = [
    *torch_rivals(eager_swiglu),
    Rival("liger", lambda f: f.apply, ("liger_kernel.ops.swiglu:LigerSiLUMulFunction",)),  # overwrites its inputs: last
]
HEAD = [
    Rival("torch", lambda: eager_head),
    Rival("liger", liger_head, ("liger_kernel.ops.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction",)),
    Rival("cut-cross-entropy", lambda f: f, ("cut_cross_entropy:linear_cross_entropy",)),
    quack("quack.linear_cross_entropy", "chunked_linear_cross_entropy", lambda f: lambda h, w, labels: f(h, w, labels, chunk_size=4096)),
    quack(
        "quack.cross_entropy",
        "cross_entropy",
        lambda f: lambda h, w, labels: f(F.linear(h, w), labels),
        name="quack's loss on torch's logits",
    ),
]
GELU = [
    *torch_rivals(eager_gelu),
    # For autograd quack's result is the pre-activation (its next operator computes the rest): it is compared in forward only.
    quack(
        "quack.linear",
        "linear_act_func",
        lambda f: lambda x, w, bias: f(x, w, "gelu_tanh_approx", bias=bias, store_preact=False, tuned=False)[1],
    ),
]
