"""SwiGLU and the gated MLP in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from eagle_kernels.matmul import wide_dtype


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise, for gate and up of one shape."""
    wide = wide_dtype(gate.dtype)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`swiglu(x w_gate^T, x w_up^T) w_down^T`. x: [..., H], w_gate and w_up: [I, H], w_down: [H, I] -> [..., H]."""
    return F.linear(swiglu(F.linear(x, w_gate), F.linear(x, w_up)), w_down)
