"""Linear layers whose products are of 8-bit floats, forward and backward; weights and activations are kept in their own dtype."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagle_kernels import checks
from eagle_kernels.dispatch import declare
from eagle_kernels.matmul import accumulate_
from eagle_kernels.ops.float8.rounding import (
    FAST_INPUT_GRADIENT,
    FAST_OUTPUT,
    FAST_WEIGHT_GRADIENT,
    MULTIPLE,
    Rounded,
    by_columns,
    by_rows,
    product,
)
from eagle_kernels.weights import gathered, gradient_dtype, lowered

declare("float8_linear", "float8_linears", "float8_mlp")


def check_width(operator: str, name: str, weight: Tensor) -> None:
    """Raises ValueError unless both sizes of a weight are multiples of 16."""
    if weight.ndim != 2 or any(size % MULTIPLE for size in weight.shape):
        raise ValueError(
            f"{operator}: {name} has shape {tuple(weight.shape)}; products of 8-bit floats need two sizes that are multiples of {MULTIPLE}"
        )


def output(x: Rounded, weight: Tensor, rows: int) -> Tensor:
    """`x w^T`, [rows, N], from a rounded x and the rounded weight."""
    return product(x, by_rows(weight), rows, weight.dtype, fast=FAST_OUTPUT)


def input_gradient(dout: Rounded, weight: Tensor, rows: int) -> Tensor:
    """`dout w`, [rows, K], from a gradient [rows, N] that is rounded by rows. weight: [N, K]."""
    return product(dout, by_columns(weight), rows, weight.dtype, fast=FAST_INPUT_GRADIENT)


class WeightGradients:
    """`dout^T x` for weights that are multiplied with the same x, which is rounded once.

    exact: from the values as they are, added in float32.
    """

    def __init__(self, x: Tensor, exact: bool) -> None:
        self.x, self.exact = x, exact
        self._rounded: Rounded | None = None

    def of(self, dout: Tensor, dtype: torch.dtype) -> Tensor:
        """dout: [M, N], x: [M, K] -> [N, K] in `dtype`."""
        if self.exact:
            total = torch.empty(dout.shape[1], self.x.shape[1], dtype=dtype, device=dout.device)
            accumulate_(total, dout.t(), self.x, True)
            return total
        if self._rounded is None:
            self._rounded = by_columns(self.x)
        return product(by_columns(dout), self._rounded, dout.shape[1], dout.dtype, fast=FAST_WEIGHT_GRADIENT).to(dtype)


class _Linears(torch.autograd.Function):
    """Stores x and the weights in their own dtype; backward rounds them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exact: bool, dtypes: tuple[torch.dtype, ...], *weights: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.save_for_backward(x, *weights)
        ctx.exact, ctx.dtypes = exact, dtypes
        rounded = by_rows(x)
        return tuple(output(rounded, weight, len(x)) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        dx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for dout, weight in zip(douts, weights):
                part = input_gradient(by_rows(dout), weight, len(x))
                dx = part if dx is None else dx.add_(part)
        gradients = WeightGradients(x, ctx.exact)
        needed = zip(douts, ctx.dtypes, ctx.needs_input_grad[3:])
        return dx, None, None, *(gradients.of(dout, dtype) if need else None for dout, dtype, need in needed)


def float8_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None, *, exact_weight_gradient: bool = False
) -> tuple[Tensor, ...]:
    """`x w^T + b` for several weights, with x rounded once. x: [..., K], weights: [N, K] each, biases: [N] each -> [..., N] each.

    Products are of values rounded to e4m3, with a scale for each row of the left and for each column of the right matrix: the output, the
    gradient of x, and the gradients of weights, which exact_weight_gradient computes from the values as they are. Scales are powers of 2.
    The result has x's dtype; GPUs compute it in bfloat16. Devices without such products (`float8_hardware`) multiply the rounded values
    in bfloat16 or float32, with the same result except for the order of sums.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not match, for another number of biases than weights, and for sizes
    of weights that are not multiples of 16.
    """
    biases = [None] * len(weights) if biases is None else biases
    if len(biases) != len(weights):
        raise ValueError(f"float8_linears: {len(biases)} biases for {len(weights)} weights; give one for each, None where there is none")
    dtypes = tuple(gradient_dtype(weight) for weight in weights)
    x, *weights = lowered(x, *weights)
    for weight in weights:
        checks.floating("float8_linear", x=x, weight=weight)
        check_width("float8_linear", "weight", weight)
        checks.shape("float8_linear", "weight", weight, (weight.shape[0], x.shape[-1]), "[N, K], K from x")
    for weight, bias in zip(weights, biases, strict=True):
        if bias is not None:
            checks.shape("float8_linear", "bias", bias, (weight.shape[0],), "weight's first dimension")
            checks.same_device("float8_linear", x=x, bias=bias)
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        outs = _Linears.apply(flat, exact_weight_gradient, dtypes, *map(gathered, weights))
        outs = tuple(out if bias is None else out + bias.to(out.dtype) for out, bias in zip(outs, biases))  # type: ignore[arg-type]
    return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs)


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, exact_weight_gradient: bool = False) -> Tensor:
    """`float8_linears` for one weight. x: [..., K], weight: [N, K], bias: [N] -> [..., N]. Raises as `float8_linears`."""
    return float8_linears(x, [weight], [bias], exact_weight_gradient=exact_weight_gradient)[0]
