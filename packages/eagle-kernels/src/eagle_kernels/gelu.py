"""Linear layer followed by GELU: the vision tower's fc1 and the connector."""

from torch import Tensor

from eagle_kernels import reference


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """`gelu(x weight^T + bias)`. x: [..., H], weight: [I, H], bias: [I] or None; approximate: "tanh" or "none" (erf)."""
    return reference.gelu_linear(x, weight, bias, approximate)
