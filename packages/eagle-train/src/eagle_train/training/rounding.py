"""Stochastic rounding of float32 to bfloat16, defined element by element, so that it repeats and does not depend on ranks or devices.

A float32 lies between two neighbouring bfloat16 values. It becomes the one away from zero with a probability that is the share of the
way to it, else the one towards zero: the expected value is the float32 itself. The 16 random bits of an element are a hash of (key, number
of the element in the whole tensor); `key_of` makes the key from a parameter's name and the step.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements that are rounded at a time: the hash takes 16 bytes for each of them."""
_MASK = 0xFFFFFFFF
HAS_TRITON = find_spec("triton") is not None


def key_of(*what: object) -> int:
    """32 bits that depend on all arguments."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "little")


def hashed(numbers: Tensor, key: int) -> Tensor:
    """32 random bits of each number: int64 in [0, 2^32) -> int64 in [0, 2^32), by two rounds of the `lowbias32` mixing function."""
    bits = numbers
    for constant in (key, 0x9E3779B9):
        bits = (bits ^ constant) & _MASK
        bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _MASK
        bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _MASK
        bits = bits ^ (bits >> 16)
    return bits


def round_into(target: Tensor, values: Tensor, key: int, first: int = 0) -> None:
    """Write float32 `values` into the bfloat16 tensor `target` of the same shape, both contiguous.

    first: number of the first element in the whole tensor, where this is a shard of it. What is not finite stays as it is; a finite value
    beyond the largest bfloat16 may become infinite, as in rounding to the nearest. One kernel on a GPU.
    """
    flat, out = values.view(-1), target.view(-1)
    if flat.is_cuda and HAS_TRITON:
        from .rounding_kernel import launch

        launch(out, flat, key, first)
        return
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        numbers = torch.arange(first + start, first + start + part.numel(), device=part.device)
        noise = (hashed(numbers & _MASK, key) >> 16).to(torch.int32)
        # Sign and magnitude: adding to the bits moves away from zero, and cutting off the low half moves towards it.
        rounded = ((part.view(torch.int32) + noise) & -65536).view(torch.float32)
        out[start : start + CHUNK] = torch.where(torch.isfinite(part), rounded, part).to(torch.bfloat16)
