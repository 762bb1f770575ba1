"""Sizes of an 8B model (Qwen2 7B decoder), at which the operators are measured and tuned."""

import torch

TOKENS, HIDDEN, INNER, Q_HEADS, K_HEADS, HEAD_DIM, VOCAB = 32768, 3584, 18944, 28, 4, 128, 152064
BF16 = torch.bfloat16


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal bf16 values on the GPU, with gradient."""
    return (torch.randn(*shape, device="cuda") * scale).to(BF16).requires_grad_()


def inverse_frequencies() -> torch.Tensor:
    return 1e6 ** (-torch.arange(0, HEAD_DIM, 2, device="cuda", dtype=torch.float32) / HEAD_DIM)
