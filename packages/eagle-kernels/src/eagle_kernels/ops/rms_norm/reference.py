"""RMS normalisation in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from eagle_kernels.matmul import wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension. x: [..., H], weight: [H] -> [..., H] in x's dtype."""
    wide = wide_dtype(x.dtype)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`(rms_norm(total), total)` with `total = residual + x`, rounded to the inputs' dtype before it is normalised."""
    total = residual + x
    return rms_norm(total, weight, eps), total
