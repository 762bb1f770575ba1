"""The gated MLP with products of 8-bit floats. Backward computes the activation again, and gate and up where they are not stored."""

from typing import Any

import torch
from torch import Tensor

from eagle_kernels.ops.float8.function import (
    WeightGradients,
    check_width,
    float8_linear,
    float8_linears,
    input_gradient,
    output,
)
from eagle_kernels.ops.float8.rounding import by_rows, swiglu_backward_by_rows, swiglu_by_rows, uses_kernels
from eagle_kernels.ops.swiglu import swiglu
from eagle_kernels.ops.swiglu.function import check_mlp
from eagle_kernels.weights import gathered, gradient_dtype, lowered


class _MLP(torch.autograd.Function):
    """Stores x, gate and up, or (recompute) only x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recompute: bool, exact: bool, dtypes: tuple[torch.dtype, ...], *weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.exact, ctx.dtypes = exact, dtypes
        w_gate, w_up, w_down = weights
        gate, up = _gate_and_up(x, w_gate, w_up)
        ctx.save_for_backward(x, *weights, *(() if recompute else (gate, up)))
        return output(swiglu_by_rows(gate, up), w_down, len(x))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w_gate, w_up, w_down, *kept = ctx.saved_tensors
        needs_x, *_, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        gate, up = kept or _gate_and_up(x, w_gate, w_up)
        rows = len(x)
        dinner = input_gradient(by_rows(dout), w_down, rows)
        dgate, dup, dgate_rounded, dup_rounded, inner = swiglu_backward_by_rows(dinner, gate, up, needs_down)
        del gate, up, kept, dinner
        dx = input_gradient(dgate_rounded, w_gate, rows).add_(input_gradient(dup_rounded, w_up, rows)) if needs_x else None
        del dgate_rounded, dup_rounded
        shared = WeightGradients(x, ctx.exact)
        return (
            *(dx, None, None, None),
            shared.of(dgate, ctx.dtypes[0]) if needs_gate else None,
            shared.of(dup, ctx.dtypes[1]) if needs_up else None,
            WeightGradients(inner, ctx.exact).of(dout, ctx.dtypes[2]) if needs_down else None,
        )


def _gate_and_up(x: Tensor, w_gate: Tensor, w_up: Tensor) -> tuple[Tensor, Tensor]:
    rounded = by_rows(x)
    return output(rounded, w_gate, len(x)), output(rounded, w_up, len(x))


def float8_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, recompute: bool = False, exact_weight_gradient: bool = False
) -> Tensor:
    """`swiglu(x w_gate^T, x w_up^T) w_down^T` with the products of `float8_linears`.

    x: [..., H], w_gate and w_up: [I, H], w_down: [H, I] -> [..., H]. recompute: backward computes gate and up again from x. The torch
    implementation stores its intermediate results. Raises ValueError or TypeError as `float8_linears`.
    """
    dtypes = tuple(gradient_dtype(weight) for weight in (w_gate, w_up, w_down))
    x, w_gate, w_up, w_down = lowered(x, w_gate, w_up, w_down)
    check_mlp("float8_mlp", x, w_gate, w_up, w_down)
    for name, weight in (("w_gate", w_gate), ("w_down", w_down)):
        check_width("float8_mlp", name, weight)
    with torch.autocast(x.device.type, enabled=False):
        weights = [gathered(weight) for weight in (w_gate, w_up, w_down)]
        if not uses_kernels(x):
            inner = swiglu(*float8_linears(x, weights[:2], exact_weight_gradient=exact_weight_gradient))
            return float8_linear(inner, weights[2], exact_weight_gradient=exact_weight_gradient)
        flat = x.reshape(-1, x.shape[-1])
        return _MLP.apply(flat, recompute, exact_weight_gradient, dtypes, *weights).view(x.shape)  # type: ignore[attr-defined]
