"""Activation checkpoints whose inputs wait in host memory."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


class OffloadEngine:
    """Keeps checkpointed hidden states in one pinned arena of host memory (being built)."""


def offload_checkpoint(function: Callable[..., Any], *args: Any, engine: OffloadEngine | None = None) -> Any:
    """`function(*args)`, rebuilt in backward; with an engine the tensors in `args` wait in host memory until then."""
    return checkpoint(function, *args, use_reentrant=False)
