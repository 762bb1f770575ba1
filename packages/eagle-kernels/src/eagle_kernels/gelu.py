"""Linear layer followed by GELU: the vision tower's fc1 and the connector."""

import torch
from torch import Tensor

from eagle_kernels import checks, reference
from eagle_kernels.dispatch import use_triton


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """`gelu(x weight^T + bias)`. x: [..., H], weight: [I, H], bias: [I] or None; approximate: "tanh" or "none" (erf).

    On NVIDIA GPUs, with tanh, a bias and no gradient wanted, the activation runs inside the matmul (cuBLASLt's epilogue) and the
    pre-activation is never stored. With gradients it is the plain composition, because backward needs the pre-activation.
    Raises ValueError or TypeError on shapes, dtypes or devices that don't fit.
    """
    checks.gelu_linear(x, weight, bias, approximate)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if torch.is_autocast_enabled(x.device.type):
        return reference.gelu_linear(x, weight, bias, approximate)
    if use_triton("gelu_linear", x) and approximate == "tanh" and bias is not None and not wanted:
        flat = x.reshape(-1, x.shape[-1])
        return torch.ops.aten._addmm_activation(bias, flat, weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])
    return reference.gelu_linear(x, weight, bias, approximate)
