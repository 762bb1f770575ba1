"""Linear layer followed by GELU: the first MLP projection of the vision tower, and the connector."""

import torch
from torch import Tensor

from eagle_kernels import checks
from eagle_kernels.dispatch import declare, use_triton
from eagle_kernels.ops.gelu import reference

declare("gelu_linear")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> None:
    if approximate not in ("tanh", "none"):
        raise ValueError(f'gelu_linear: approximate is {approximate!r}, expected "tanh" or "none"')
    if not torch.is_autocast_enabled(x.device.type):
        checks.floating("gelu_linear", **({"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})))
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"gelu_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected [..., H] and [I, H]")
    if bias is not None:
        checks.shape("gelu_linear", "bias", bias, (weight.shape[0],), "weight's first dimension")


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """`gelu(x weight^T + bias)` (Hendrycks & Gimpel 2016). x: [..., H], weight: [I, H], bias: [I] or None -> [..., I].

    approximate: "tanh" or "none" (the error function).
    On NVIDIA GPUs, with "tanh", a bias and no gradient, the activation runs in the epilogue of cuBLASLt's matmul and the pre-activation is
    never stored. With gradients it is the plain composition, because backward needs the pre-activation.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not match.
    """
    _check(x, weight, bias, approximate)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if torch.is_autocast_enabled(x.device.type):
        return reference.gelu_linear(x, weight, bias, approximate)
    if use_triton(x) and approximate == "tanh" and bias is not None and not needs_gradient:
        flat = x.reshape(-1, x.shape[-1])
        return torch.ops.aten._addmm_activation(bias, flat, weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])
    return reference.gelu_linear(x, weight, bias, approximate)
