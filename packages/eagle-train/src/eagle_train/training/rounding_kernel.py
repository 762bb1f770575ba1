"""Stochastic rounding (`rounding.round_into`) as one kernel, which reads and writes each number once."""

# Triton's language has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _mixed(bits):
    # Constants beyond 2^31 are 64-bit: every result is cut to 32 bits again.
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D).to(tl.uint32)
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B).to(tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def rounded(value, i, first, key):
    """float32 values, elements `first + i` of a tensor, as bfloat16."""
    bits = _mixed(((first + i).to(tl.uint32) ^ key).to(tl.uint32))
    bits = _mixed((bits ^ 0x9E3779B9).to(tl.uint32))
    pattern = value.to(tl.uint32, bitcast=True)
    low = ((pattern + (bits >> 16)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    finite = (pattern & 0x7F800000) != 0x7F800000
    return tl.where(finite, low, value.to(tl.bfloat16))


@triton.jit
def _round(target, values, count, first, key, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    real = i < count
    tl.store(target + i, rounded(tl.load(values + i, mask=real, other=0.0), i, first, key), mask=real)


def launch(target: Tensor, values: Tensor, key: int, first: int) -> None:
    """target: bfloat16 [n], values: float32 [n], both contiguous, on one GPU."""
    kernel: Any = _round[(triton.cdiv(values.numel(), BLOCK),)]
    kernel(target, values, values.numel(), first, key, SIZE=BLOCK)
