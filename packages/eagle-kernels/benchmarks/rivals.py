"""The contenders of every operator: plain torch, the same compiled, and public libraries where they are installed."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def optional(module: str, name: str) -> Any:
    """An attribute of a module that may not be installed, or not fit what is, else None."""
    try:
        if module.startswith("quack."):
            _let_quack_compile()
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError):
            print(f"{module}.{name} can't be imported: {type(error).__name__}: {str(error)[:200]}")
        return None


@functools.cache
def _let_quack_compile() -> None:
    """quack 0.6.5 keys its compiled matmuls by everything that their epilogues refer to, and stops at what it doesn't know: the context
    variables in which newer CuTe DSLs (4.8.1) keep source locations. Their names will do as keys, since no arithmetic depends on them."""
    identity = importlib.import_module("quack.gemm_runtime.identity")
    known = identity.semantic_value_key

    def key(value: Any, seen: Any) -> Any:
        try:
            return known(value, seen)
        except TypeError:
            return ("unknown", type(value).__qualname__, getattr(value, "name", ""))

    identity.semantic_value_key = key


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


def rms_norms() -> dict[str, Callable]:
    liger = optional("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    quack = optional("quack.rmsnorm", "rmsnorm")
    out: dict[str, Callable] = {"torch": eager_rms_norm, "torch.compile": torch.compile(eager_rms_norm)}
    out["F.rms_norm"] = lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6)
    if liger is not None:
        out["liger"] = lambda x, w: liger.apply(x, w, 1e-6, 0.0, "llama", False)
    if quack is not None:
        out["quack"] = lambda x, w: quack(x, w, eps=1e-6)
    return out


def add_rms_norms() -> dict[str, Callable]:
    liger = optional("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    out: dict[str, Callable] = {"torch": eager_add_rms_norm, "torch.compile": torch.compile(eager_add_rms_norm)}
    if liger is not None:
        out["liger"] = lambda residual, x, w: liger.apply(x, residual, w, 1e-6, 0.0, "llama", False)
    if (quack := optional("quack.rmsnorm", "rmsnorm")) is not None:
        out["quack"] = lambda residual, x, w: quack(x, w, residual=residual, eps=1e-6, prenorm=True)
    return out


def ropes() -> dict[str, Callable]:
    liger = optional("liger_kernel.ops.rope", "LigerRopeFunction")
    out: dict[str, Callable] = {"torch": eager_rope, "torch.compile": torch.compile(eager_rope)}
    if liger is not None:
        # It takes [B, heads, T, D] and makes the layout it wants by itself.
        out["liger"] = lambda q, k, cos, sin: liger.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    if (quack := optional("quack.rotary", "apply_rotary_emb")) is not None:

        def quack_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            # Its tables hold one half; queries and keys are two calls.
            half = cos.shape[-1] // 2
            return tuple(quack(x[None], cos[:, :half], sin[:, :half]) for x in (q, k))

        out["quack"] = quack_rope
    return out


def swiglus() -> dict[str, Callable]:
    liger = optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    out: dict[str, Callable] = {"torch": eager_swiglu, "torch.compile": torch.compile(eager_swiglu)}
    if liger is not None:
        out["liger"] = liger.apply
    return out


def heads() -> dict[str, Callable]:
    liger = optional("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    cut = optional("cut_cross_entropy", "linear_cross_entropy")
    out: dict[str, Callable] = {"torch": eager_head}
    if liger is not None:

        def liger_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            result = liger.apply(hidden, weight, labels)
            return result[0] if isinstance(result, tuple) else result

        out["liger"] = liger_head
    if cut is not None:
        out["cut-cross-entropy"] = cut
    if (quack := optional("quack.linear_cross_entropy", "chunked_linear_cross_entropy")) is not None:
        out["quack"] = lambda hidden, weight, labels: quack(hidden, weight, labels, chunk_size=4096)
    if (quack_loss := optional("quack.cross_entropy", "cross_entropy")) is not None:
        out["quack's loss on torch's logits"] = lambda hidden, weight, labels: quack_loss(F.linear(hidden, weight), labels)
    return out


def gelus() -> dict[str, Callable]:
    out: dict[str, Callable] = {"torch": eager_gelu, "torch.compile": torch.compile(eager_gelu)}
    if (quack := optional("quack.linear", "linear_act_func")) is not None:
        # For autograd its result is the pre-activation (the next layer's operator knows the rest): it races forward only.
        out["quack"] = lambda x, weight, bias: quack(x, weight, "gelu_tanh_approx", bias=bias, store_preact=False, tuned=False)[1]
    return out
