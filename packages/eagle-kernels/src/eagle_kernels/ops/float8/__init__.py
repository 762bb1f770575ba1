"""Linear layers and the gated MLP with matrix products of 8-bit floats."""

from eagle_kernels.ops.float8.function import float8_linear, float8_linears
from eagle_kernels.ops.float8.mlp import float8_mlp
from eagle_kernels.ops.float8.rounding import CAPABILITY, MULTIPLE, float8_hardware

__all__ = ["CAPABILITY", "MULTIPLE", "float8_hardware", "float8_linear", "float8_linears", "float8_mlp"]
