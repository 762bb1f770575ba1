"""RMS normalisation, alone and fused with the residual addition before it."""

from eagle_kernels.ops.rms_norm.function import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
