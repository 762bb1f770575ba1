"""What operators need to know about a weight: its whole value where it is sharded, and the dtype of its gradient."""

import torch
from torch import Tensor


def gathered(weight: Tensor) -> Tensor:
    """The whole weight. A DTensor (FSDP2, tensor parallel) is gathered, and its gradient returns to the shards."""
    full = getattr(weight, "full_tensor", None)
    return full() if full is not None else weight


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the gradient of `weight`: `weight.grad_dtype` where the caller set one (torch >= 2.11), else the weight's dtype."""
    if torch.compiler.is_compiling() or not weight.is_leaf:
        return weight.dtype
    return getattr(weight, "grad_dtype", None) or weight.dtype
