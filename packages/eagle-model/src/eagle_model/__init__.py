"""The Eagle 2.5 vision-language model: configuration, processor, modelling, generation, checkpoints."""

__version__ = "0.1.0"
