"""What processes of `eagle` set for GPUs before torch is imported: torch's allocator, and where compiled kernels are kept."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from importlib.util import find_spec
from pathlib import Path

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let segments of GPU memory grow (`expandable_segments`), unless one of torch's variables is set already.

    Packs differ in length, and pieces of the size of one pack do not serve the next: a step of the 8B at 128K tokens on an H200 ran out
    of memory with 123 GiB in use of 136 GiB held (2026-11-28).
    """
    if not any(name in environment for name in _SETTINGS):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_kernels(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let flash-attn-4 keep its compiled kernels in files, as Triton does by itself, unless its variable is set already.

    The first forward and backward of a process took 22 s without them and 7 s with them (two kinds of packs, H200, 2026-11-28).
    """
    if "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED" in environment or find_spec("flash_attn") is None:
        return
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagle" / "flash-attn-4"
    folder = environment.get("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache))
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:  # no home, or one that can't be written: as without this setting
        return
    environment["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
    environment["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = folder
