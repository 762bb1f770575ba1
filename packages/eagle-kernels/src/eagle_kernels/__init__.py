"""Fused Triton operators for long-context training, exact to the last gradient, with plain-torch references."""

__version__ = "0.1.0"
