"""Linear layer and GELU in plain torch."""

import torch.nn.functional as F
from torch import Tensor


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """`gelu(x weight^T + bias)`. x: [..., H], weight: [I, H], bias: [I] -> [..., I]."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)
