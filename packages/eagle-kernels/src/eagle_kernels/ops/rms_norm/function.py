"""RMS normalisation of rows, alone and fused with the residual addition before it."""

import math
from typing import Any

import torch
from torch import Tensor

from eagle_kernels import checks
from eagle_kernels.dispatch import declare, register, use_triton
from eagle_kernels.ops.rms_norm import reference
from eagle_kernels.weights import gathered, gradient_dtype

declare("rms_norm", "add_rms_norm")

MAX_WIDTH = 65536  # one row must fit the registers of one program; wider rows use the reference


def _check(operator: str, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> None:
    if residual is None:
        checks.floating(operator, x=x)
    else:
        checks.floating(operator, x=x, residual=residual)
        checks.shape(operator, "residual", residual, tuple(x.shape), "x's")
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{operator}: weight is {weight.dtype}, expected x's {x.dtype} or torch.float32")
    checks.same_device(operator, x=x, weight=weight)
    if x.ndim == 0:
        raise ValueError(f"{operator}: x has no dimension, expected [..., H]")
    checks.shape(operator, "weight", weight, (x.shape[-1],), "x's last dimension")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{operator}: eps is {eps}, expected a number from 0 on")


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from eagle_kernels.ops.rms_norm.kernel import launch_forward

    return launch_forward(x, residual, weight, eps)


def _forward_fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else (0,)), x.new_empty(rows, dtype=torch.float32)


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from eagle_kernels.ops.rms_norm.kernel import launch_backward

    return launch_backward(dy, dtotal, x, weight, rstd, weight_dtype)


register("rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
register(
    "rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor rstd, ScalarType weight_dtype) -> (Tensor, Tensor)",
    _backward,
    lambda dy, dtotal, x, weight, rstd, weight_dtype: (x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=weight_dtype)),
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, weight_dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        y, _, rstd = torch.ops.eagle_kernels.rms_norm_forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.weight_dtype = weight_dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = torch.ops.eagle_kernels.rms_norm_backward(dy, None, x, weight, rstd, ctx.weight_dtype)
        return dx, dweight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, eps: float, weight_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, total, rstd = torch.ops.eagle_kernels.rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.weight_dtype = weight_dtype
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = torch.ops.eagle_kernels.rms_norm_backward(dy, dtotal, total, weight, rstd, ctx.weight_dtype)
        return dx, dx, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang & Sennrich 2019). x: [..., H], weight: [H] -> [..., H].

    Computed in float32 and rounded once, to x's dtype. The weight has x's dtype or float32; its gradient is summed in float32.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not match, and for a negative eps.
    """
    _check("rms_norm", x, weight, eps)
    weight_dtype, weight = gradient_dtype(weight), gathered(weight)
    if use_triton(x) and 0 < x.shape[-1] <= MAX_WIDTH:
        if not torch.is_grad_enabled():
            return torch.ops.eagle_kernels.rms_norm_forward(x, None, weight, eps)[0]
        return _RMSNorm.apply(x, weight, eps, weight_dtype)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`(rms_norm(total), total)` with `total = residual + x`, rounded to their dtype, in one pass. residual, x: [..., H], weight: [H].

    Under autocast x is cast to the residual's dtype, because projections return the autocast dtype there.
    Raises as `rms_norm` does.
    """
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        x = x.to(residual.dtype)
    _check("add_rms_norm", x, weight, eps, residual)
    weight_dtype, weight = gradient_dtype(weight), gathered(weight)
    if use_triton(x) and 0 < x.shape[-1] <= MAX_WIDTH:
        if not torch.is_grad_enabled():
            y, total, _ = torch.ops.eagle_kernels.rms_norm_forward(x, residual, weight, eps)
            return y, total
        return _AddRMSNorm.apply(residual, x, weight, eps, weight_dtype)
    return reference.add_rms_norm(residual, x, weight, eps)
