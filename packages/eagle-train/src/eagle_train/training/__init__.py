"""The model of a run, the training loop, optimizers, activation checkpointing, checkpoints, metrics and signals."""
