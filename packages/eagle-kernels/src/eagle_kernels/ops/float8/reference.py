"""Rounding to 8-bit floats and products of rounded matrices, in plain torch: the definition, and the implementation on the CPU.

A matrix is rounded to e4m3 (4 bits of exponent, 3 of mantissa, at most 448) with one scale for each row or for each column, a power of 2:
the least one with which the largest value of the row fits. So dividing by it is exact, and a rounded value times its scale is exact in
bfloat16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle_kernels.matmul import wide_dtype
from eagle_kernels.ops.swiglu.reference import swiglu

LARGEST = 448.0
"""The largest finite e4m3 value."""
LEAST = 1e-12
"""Rows of smaller values are scaled as if this were their largest."""


def scales_of(largest: Tensor) -> Tensor:
    """Scales, float32, for rows whose largest absolute values are `largest`; NaN where these are NaN."""
    bits = largest.float().clamp_min(LEAST).view(torch.int32)
    # 448 is 1.75 * 2^8. A mantissa above 1.75 carries into the exponent; what is left of the mantissa is dropped.
    scales = ((bits + 0x1FFFFF) & -0x800000).view(torch.float32) / 256
    return torch.where(largest.isnan(), torch.nan, scales)


def rows(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """x: [M, K] -> e4m3 [padded, K] and float32 scales [padded, 1], one for each row; rows from M on are zeros with scale 1."""
    scales = scales_of(x.abs().amax(1, keepdim=True))
    values = (x / scales).float().to(torch.float8_e4m3fn)
    more = padded - x.shape[0]
    if not more:
        return values, scales
    return torch.cat([values, values.new_zeros(more, x.shape[1])]), torch.cat([scales, scales.new_ones(more, 1)])


def columns(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """x: [M, K] -> e4m3 [K, padded], the transposed matrix, and float32 scales [K, 1], one for each column of x; zeros from M on."""
    scales = scales_of(x.abs().amax(0, keepdim=True) if x.shape[0] else x.new_zeros(1, x.shape[1]))
    values = (x / scales).float().t().to(torch.float8_e4m3fn)
    return torch.cat([values, values.new_zeros(x.shape[1], padded - x.shape[0])], 1).contiguous(), scales.t().contiguous()


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """a: e4m3 [M, K], b: e4m3 [N, K], with scales of their rows -> `(a * a_scales) (b * b_scales)^T` in `dtype`, [M, N]."""
    exact = dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32
    left, right = (values.to(exact) * scales.to(exact) for values, scales in ((a, a_scales), (b, b_scales)))
    return (left @ right.t()).to(dtype)


def rounded(x: Tensor, dim: int) -> Tensor:
    """The values that x [M, K] has after rounding with a scale for each row (dim 1) or column (dim 0), in x's dtype."""
    scales = scales_of(x.abs().amax(dim, keepdim=True)).to(wide_dtype(x.dtype))
    return ((x / scales).float().to(torch.float8_e4m3fn).to(scales.dtype) * scales).to(x.dtype)


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, exact_weight_gradient: bool = False) -> Tensor:
    """`x w^T + b` as `eagle_kernels.float8_linear`, from rounded values in x's dtype. x: [M, K], weight: [N, K], bias: [N] -> [M, N]."""
    out = _Linear.apply(x, weight, exact_weight_gradient)
    return out if bias is None else out + bias


def float8_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None, *, exact_weight_gradient: bool = False
) -> tuple[Tensor, ...]:
    """`float8_linear` for each weight."""
    pairs = zip(weights, biases or [None] * len(weights))
    return tuple(float8_linear(x, weight, bias, exact_weight_gradient=exact_weight_gradient) for weight, bias in pairs)


def float8_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, exact_weight_gradient: bool = False) -> Tensor:
    """`swiglu(x w_gate^T, x w_up^T) w_down^T` of `float8_linear`. x: [M, H], w_gate and w_up: [I, H], w_down: [H, I] -> [M, H]."""
    gate, up = float8_linears(x, [w_gate, w_up], exact_weight_gradient=exact_weight_gradient)
    return float8_linear(swiglu(gate, up), w_down, exact_weight_gradient=exact_weight_gradient)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, exact: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.exact = exact
        return rounded(x, 1) @ rounded(weight, 1).t()

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = rounded(dout, 1) @ rounded(weight, 0)
        return dx, dout.t() @ x if ctx.exact else rounded(dout, 0).t() @ rounded(x, 0), None
