"""Rotary position embedding of queries and keys."""

from eagle_kernels.ops.rope.function import rope

__all__ = ["rope"]
