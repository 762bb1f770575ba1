"""What learns, how fast: parts of the model, AdamW's groups, and the learning rate at every step of a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from eagle_train.config import StageConfig


def set_trainable(model: nn.Module, parts: Sequence[str]) -> int:
    """Let the parts named learn and freeze the others; returns the number of elements (of this rank) that learn.

    Raises ValueError for a parameter that belongs to no part of the model.
    """
    owners = {id(parameter): name for name, part in model.parts().items() for parameter in part.parameters()}  # type: ignore[operator]
    count = 0
    for name, parameter in model.named_parameters():
        if id(parameter) not in owners:
            raise ValueError(
                f"parameter {name} belongs to none of the model's parts, which are {', '.join(dict.fromkeys(owners.values()))}"
            )
        parameter.requires_grad_(owners[id(parameter)] in parts)
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


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, stage: StageConfig) -> float:
    """Set every group's learning rate for optimizer step `step` of `steps`; returns that of the stage.

    A group's `lr_scale` (default: 1) multiplies it, so that parts can learn at rates of their own.
    """
    lr = learning_rate(step, steps, stage)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


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
