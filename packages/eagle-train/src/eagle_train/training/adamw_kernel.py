"""A step of AdamW as one kernel, with states of 8 bits or float32: that of `adamw8bit` and `adamw.RoundingAdamW`, and their rounding.

States of 8 bits are those of torchao: codes in blocks of 256, a float32 scale for each block (its largest magnitude), and a sorted table
of 256 values between which codes choose (arXiv 2110.02861). Each number is read and written once.
"""

# Triton's language has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding_kernel import rounded

ELEMENTS = 1024
"""Of a program; several blocks of states."""


@triton.jit
def _nearest(table, value):
    """The number of the entry of a sorted table of 256 that is nearest to each value; of two, the larger."""
    code = tl.zeros(value.shape, tl.int32)
    for power in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]
        half = 128 >> power
        code = tl.where(value >= tl.load(table + code + half), code + half, code)
    above = tl.minimum(code + 1, 255)
    low = tl.load(table + code)
    return tl.where(value - low >= (tl.load(table + above) - low) * 0.5, above, code)


@triton.jit
def _step(
    weights, gradients, means, squares, mean_scales, square_scales, mean_table, square_table, count, lr, decay, beta1, beta2, eps,
    correction1, correction2, smallest, first, key,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, QUANTISED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = i < count
    weight = tl.load(weights + i, mask=real, other=0.0).to(tl.float32)
    gradient = tl.load(gradients + i, mask=real, other=0.0).to(tl.float32)
    inside = block * BLOCK < count
    if QUANTISED:
        mean_scale = tl.load(mean_scales + block, mask=inside, other=0.0)
        square_scale = tl.load(square_scales + block, mask=inside, other=0.0)
        mean = tl.load(mean_table + tl.load(means + i, mask=real, other=0).to(tl.int32)) * mean_scale[:, None]
        square = tl.load(square_table + tl.load(squares + i, mask=real, other=0).to(tl.int32)) * square_scale[:, None]
    else:
        mean = tl.load(means + i, mask=real, other=0.0)
        square = tl.load(squares + i, mask=real, other=0.0)
    new_mean = mean + (1.0 - beta1) * (gradient - mean)
    new_square = square + (1.0 - beta2) * (gradient * gradient - square)
    divided = new_square
    if QUANTISED:
        largest = tl.max(new_square, axis=1)
        mean_scale = tl.maximum(tl.max(tl.abs(new_mean), axis=1), 1e-12)
        square_scale = tl.maximum(largest, 1e-12)
        tl.store(means + i, _nearest(mean_table, tl.div_rn(new_mean, mean_scale[:, None])).to(tl.uint8), mask=real)
        tl.store(squares + i, _nearest(square_table, tl.div_rn(new_square, square_scale[:, None])).to(tl.uint8), mask=real)
        tl.store(mean_scales + block, mean_scale, mask=inside)
        tl.store(square_scales + block, square_scale, mask=inside)
        lost = (square == 0.0) & (mean != 0.0)
        divided = tl.where(lost, tl.maximum(new_square, (largest * smallest)[:, None]), new_square)
    else:
        tl.store(means + i, new_mean, mask=real)
        tl.store(squares + i, new_square, mask=real)
    divisor = tl.sqrt_rn(tl.div_rn(divided, correction2)) + eps
    weight = weight * (1.0 - lr * decay) - lr * tl.div_rn(tl.div_rn(new_mean, correction1), divisor)
    if LOW:
        tl.store(weights + i, rounded(weight, i, first, key), mask=real)
    else:
        tl.store(weights + i, weight, mask=real)


def launch(
    weights: Tensor, gradient: Tensor, mean: Any, square: Any, block: int, *,
    step: int, lr: float, betas: tuple[float, float], decay: float, eps: float, smallest: float, key: int, first: int,
) -> None:  # fmt: skip
    """One step of n elements, in place; all tensors are contiguous.

    weights: float32 or bfloat16, rounded stochastically by `key` and `first` (`round_into`). mean, square: torchao's 8-bit states with
    blocks of `block` elements, n a multiple of it; float32 tensors where block is 0. step: from 1.
    """
    quantised = block > 0
    block = block or ELEMENTS
    rows = max(1, ELEMENTS // block)
    tensors = (
        (mean.codes, square.codes, mean.scale, square.scale, mean.qmap, square.qmap)
        if quantised
        else (mean, square, weights, weights, weights, weights)  # the last four are not read
    )
    kernel: Any = _step[(triton.cdiv(weights.numel(), rows * block),)]
    kernel(
        weights, gradient, *tensors, weights.numel(), lr, decay, *betas, eps, 1 - betas[0] ** step, 1 - betas[1] ** step, smallest,
        first, key, BLOCK=block, ROWS=rows, QUANTISED=quantised, LOW=weights.dtype == torch.bfloat16,
    )  # fmt: skip
