"""Context-parallel attention for packed sequences, exact in every gradient, on stock PyTorch."""

from eagle_cp.attention import attention
from eagle_cp.layout import Layout

__all__ = ["Layout", "attention"]
