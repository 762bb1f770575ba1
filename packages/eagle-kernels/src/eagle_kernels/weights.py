"""What operators need to know about a weight: its whole value where it is sharded, its dtype under autocast, and that of its gradient."""

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


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for the device of the first, else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
