"""`nn.Module`s around the operators. Their parameters are named as in transformers' Llama and Qwen."""

import torch
from torch import Tensor, nn

from eagle_kernels.ops.linear_cross_entropy import LinearCrossEntropyResult, linear_cross_entropy
from eagle_kernels.ops.rms_norm import add_rms_norm, rms_norm
from eagle_kernels.ops.swiglu import swiglu_mlp


class RMSNorm(nn.Module):
    """`rms_norm` with a weight [H]. With a residual it is `add_rms_norm`, which returns the normalised and the summed states."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x: [..., H] -> [..., H]; with residual [..., H] -> (normalised, residual + x)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(residual, x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SwiGLUMLP(nn.Module):
    """`swiglu_mlp` with `gate_proj`, `up_proj` and `down_proj`. rows: bounds its memory (None: all rows at once)."""

    def __init__(self, hidden_size: int, intermediate_size: int, rows: int | None = None, device=None, dtype=None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H] -> [..., H]."""
        return swiglu_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, rows=self.rows)


class LinearCrossEntropy(nn.Module):
    """Language head with a weight [V, H]. weight: an embedding's parameter to share (tied head). Raises ValueError for another shape."""

    def __init__(self, hidden_size: int, vocab_size: int, weight: nn.Parameter | None = None, device=None, dtype=None) -> None:
        super().__init__()
        if weight is not None and tuple(weight.shape) != (vocab_size, hidden_size):
            raise ValueError(f"LinearCrossEntropy: weight is {tuple(weight.shape)}, expected ({vocab_size}, {hidden_size})")
        self.weight = weight if weight is not None else nn.Parameter(torch.empty(vocab_size, hidden_size, device=device, dtype=dtype))
        if weight is None and not self.weight.is_meta:
            nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, hidden: Tensor, labels: Tensor, **options) -> Tensor | LinearCrossEntropyResult:
        """hidden: [..., H], labels: [...] -> loss. options: those of `linear_cross_entropy`."""
        return linear_cross_entropy(hidden, self.weight, labels, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., H] -> [..., V], for generation."""
        return nn.functional.linear(hidden, self.weight)
