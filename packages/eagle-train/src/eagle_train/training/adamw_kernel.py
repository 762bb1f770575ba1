"""A step of AdamW as one kernel, with states of 8 bits or float32: that of `adamw8bit` and `adamw.RoundingAdamW`, and their rounding.

States of 8 bits are those of torchao: codes in blocks of 256, a float32 scale for each block (its largest magnitude), and a sorted table
of 256 values between which codes choose (arXiv 2110.02861). Each number is read and written once.
"""

# Triton's language has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportArgumentType=false, reportMissingParameterType=false, reportUnknownParameterType=false, reportMissingTypeStubs=false

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
def _nearest(thresholds, value, ZERO: tl.constexpr, FIRST: tl.constexpr):
    """The code of each value, between -1 and 1, in a dynamic table (`codes.py`): code ZERO is 0, and the first decade has FIRST values.

    Counted by arithmetic, values of the table that are not larger than a magnitude are as many as its code is away from ZERO, or one less:
    one comparison with the threshold between the two tells. Counting wrongly by half a step, or where a decade ends, does no harm.
    """
    size = tl.abs(value)
    decade = tl.minimum(tl.maximum(tl.floor(tl.log2(size) * 0.30102999566) + 7.0, 0.0), 6.0)
    number = FIRST << decade.to(tl.int32)  # of values in it; those below it are FIRST fewer
    inside = tl.floor((size * tl.exp2((6.0 - decade) * 3.32192809489) - 0.1) * (number.to(tl.float32) / 0.9) + 0.5)
    away = number - FIRST + tl.minimum(tl.maximum(inside.to(tl.int32), 0), number)
    code = tl.where(value < 0, ZERO - 1 - away, ZERO + away)
    return code + (value >= tl.load(thresholds + code + 1)).to(tl.int32)


@triton.jit
def _step(
    weights, gradients, means, squares, mean_scales, square_scales, mean_table, square_table, mean_thresholds,
    square_thresholds, count, lr, decay, beta1, beta2, eps, correction1, correction2, smallest, first, key,
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
        tl.store(means + i, _nearest(mean_thresholds, tl.div_rn(new_mean, mean_scale[:, None]), 127, 1).to(tl.uint8), mask=real)
        tl.store(squares + i, _nearest(square_thresholds, tl.div_rn(new_square, square_scale[:, None]), 0, 2).to(tl.uint8), mask=real)
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
    weights: Tensor, gradient: Tensor, mean: Any, square: Any, block: int, thresholds: tuple[Tensor, Tensor] | None = None, *,
    step: int, lr: float, betas: tuple[float, float], decay: float, eps: float, smallest: float, key: int, first: int,
) -> None:  # fmt: skip
    """One step of n elements, in place; all tensors are contiguous.

    weights: float32 or bfloat16, rounded stochastically by `key` and `first` (`round_into`). mean, square: torchao's 8-bit states with
    blocks of `block` elements, n a multiple of it, whose tables are dynamic ones; float32 tensors where block is 0. thresholds: of the two
    tables (`codes.thresholds`), on the device. step: from 1.
    """
    quantised = block > 0
    assert quantised == (thresholds is not None)
    block = block or ELEMENTS
    rows = max(1, ELEMENTS // block)
    tensors = (
        (mean.codes, square.codes, mean.scale, square.scale, mean.qmap, square.qmap, *thresholds)
        if thresholds is not None
        else (mean, square, *[weights] * 6)  # the last six are not read
    )
    kernel: Any = _step[(triton.cdiv(weights.numel(), rows * block),)]
    kernel(
        weights, gradient, *tensors, weights.numel(), lr, decay, *betas, eps, 1 - betas[0] ** step, 1 - betas[1] ** step, smallest,
        first, key, BLOCK=block, ROWS=rows, QUANTISED=quantised, LOW=weights.dtype == torch.bfloat16,
    )  # fmt: skip
