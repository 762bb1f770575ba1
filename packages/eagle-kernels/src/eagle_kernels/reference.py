"""Every operator in plain torch: the definition of the operators, the implementation on the CPU, and what the tests compare with.

Arithmetic is done in float32 (float64 for float64 inputs) and rounded once at the end. Gradients come from autograd.
"""

from eagle_kernels.ops.float8.reference import float8_linear, float8_linears, float8_mlp
from eagle_kernels.ops.gelu.reference import gelu_linear
from eagle_kernels.ops.linear_cross_entropy.reference import linear_cross_entropy, token_losses
from eagle_kernels.ops.rms_norm.reference import add_rms_norm, rms_norm
from eagle_kernels.ops.rope.reference import rope, rope_angles
from eagle_kernels.ops.swiglu.reference import swiglu, swiglu_mlp

__all__ = [
    "add_rms_norm",
    "float8_linear",
    "float8_linears",
    "float8_mlp",
    "gelu_linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_angles",
    "swiglu",
    "swiglu_mlp",
    "token_losses",
]
