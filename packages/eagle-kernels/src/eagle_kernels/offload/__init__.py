"""Activation checkpointing with the stored activations in host memory: `offload_checkpoint`, its engine and the pinned memory."""

from eagle_kernels.offload.arena import ALIGNMENT, GIB, Arena
from eagle_kernels.offload.engine import ATTENTION_OPERATORS, OffloadEngine, offload_checkpoint
from eagle_kernels.offload.host_memory import available_host_bytes

__all__ = ["ALIGNMENT", "ATTENTION_OPERATORS", "GIB", "Arena", "OffloadEngine", "available_host_bytes", "offload_checkpoint"]
