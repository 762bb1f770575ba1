"""What learns, how fast: parts of the model, AdamW's groups, and the learning rate at every step of a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from eagle_train.config import StageConfig

PREFIXES = {"vision": "vision_model.", "connector": "mlp1.", "language": "language_model."}


def part_of(name: str) -> str:
    """The part (vision, connector, language) that a parameter belongs to, by its name."""
    for part, prefix in PREFIXES.items():
        if name.startswith(prefix):
            return part
    raise ValueError(f"parameter {name} belongs to no part of the model; parts start with {', '.join(PREFIXES.values())}")


def set_trainable(model: nn.Module, parts: Sequence[str]) -> int:
    """Let just `parts` learn; returns the number of elements (of this rank) that do."""
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
        count += parameter.numel() if parameter.requires_grad else 0
    return count


def make_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over what learns; weight decay on matrices only (no norms, no biases)."""
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.lr, betas=stage.betas, eps=stage.eps, fused=True)


def learning_rate(step: int, steps: int, stage: StageConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`: linear warm-up, then the stage's schedule down to `final_lr_ratio`."""
    warmup = round(stage.warmup_ratio * steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if stage.schedule == "constant":
        shape = 1.0
    elif stage.schedule == "linear":
        shape = 1.0 - progress
    else:
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    return stage.lr * (stage.final_lr_ratio + (1 - stage.final_lr_ratio) * shape)
