"""AdamW with states of 8 bits, by torchao (block-wise quantisation, arXiv 2110.02861)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adamw import load_without_casts

SMALLEST = 4096
"""Elements from which torchao keeps a state in 8 bits."""


def make_adamw8bit(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """torchao's `AdamW8bit` with states that stand for float32, whatever the weights are. Raises ImportError without torchao.

    torchao gives a state the weights' dtype. In torchao 0.18 a view of a state is float32 all the same, so that sharded bfloat16 weights
    (DTensor takes a view) fail in the first step; and the states of small parameters, which are not quantised, would be kept in bfloat16,
    where `beta2` near 1 changes nothing.
    """
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

    class Float32States(AdamW8bit):
        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            return OptimState8bit.zeros(p.shape, signed, block_size, p.device)

        def _new_buffer(self, p: Any, signed: bool) -> Tensor:
            local = p.to_local() if hasattr(p, "to_local") else p
            whole = local.numel() < SMALLEST or local.numel() % self.block_size
            return super()._new_buffer(torch.empty_like(p, dtype=torch.float32) if whole else p, signed)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            load_without_casts(self, state_dict)

    return Float32States(groups, **options)
