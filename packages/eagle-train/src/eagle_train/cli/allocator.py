"""torch's allocator of GPU memory, for processes of `eagle`; called before torch is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let segments of GPU memory grow (`expandable_segments`), unless one of torch's variables is set already.

    Packs differ in length, and pieces of the size of one pack do not serve the next: a step of the 8B at 128K tokens on an H200 ran out
    of memory with 123 GiB in use of 136 GiB held (2026-11-28).
    """
    if not any(name in environment for name in _SETTINGS):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
