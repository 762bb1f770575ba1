"""Language head and cross-entropy in one operator."""

from eagle_kernels.ops.linear_cross_entropy.function import LinearCrossEntropyResult, chunk_rows, linear_cross_entropy

__all__ = ["LinearCrossEntropyResult", "chunk_rows", "linear_cross_entropy"]
