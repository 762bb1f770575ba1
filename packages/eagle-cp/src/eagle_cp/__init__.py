"""Context-parallel attention for packed sequences, exact in every gradient, on stock PyTorch."""

from eagle_cp.attention import attention
from eagle_cp.layout import Layout
from eagle_cp.mesh import ContextMesh

__all__ = ["ContextMesh", "Layout", "attention"]
