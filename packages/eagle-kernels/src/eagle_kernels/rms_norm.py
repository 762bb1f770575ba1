"""RMS normalisation of rows, alone and fused with the residual addition before it."""

from torch import Tensor

from eagle_kernels import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension. x: [..., H], weight: [H] -> [..., H] in x's dtype."""
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`(rms_norm(residual + x), residual + x)` in one pass. residual, x: [..., H], weight: [H]."""
    return reference.add_rms_norm(residual, x, weight, eps)
