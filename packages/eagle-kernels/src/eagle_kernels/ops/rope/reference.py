"""Rotary position embedding in plain torch."""

import torch
from torch import Tensor

from eagle_kernels.matmul import wide_dtype


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position * inv_freq`, from float64 angles. positions: [...] int, inv_freq: [D/2] -> two [..., D/2] float64."""
    angles = positions.to(torch.float64)[..., None] * inv_freq.to(torch.float64)
    return angles.cos(), angles.sin()


def rope(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate pairs `(i, i + D/2)` of every head. q: [..., Hq, D], k: [..., Hk, D], positions: [...], inv_freq: [D/2]."""
    wide = wide_dtype(q.dtype)
    cos, sin = (part.to(wide)[..., None, :] for part in rope_angles(positions, inv_freq))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(wide).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)
