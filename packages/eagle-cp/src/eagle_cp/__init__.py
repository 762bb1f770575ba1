"""Context-parallel attention for packed sequences, exact in every gradient, on stock PyTorch."""

__version__ = "0.1.0"
