"""What fits the context (Automatic Degradation Sampling), which frames, and how to read them exactly."""

__version__ = "0.1.0"
