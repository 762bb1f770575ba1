"""What is trained, and how fast: modes of the parts, optimizers by name, their groups, and the learning rate of every step of a stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eagle_model.lora import is_adapter
from eagle_train.config import ConfigError, PartConfig, StageConfig

from .adamw import HostAdamW, RoundingAdamW
from .adamw8bit import make_adamw8bit
from .muon import Muon
from .states import Kinds


def _adamw(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    if has_bfloat16_weights(groups):
        return RoundingAdamW(groups, _take_names(groups), lr=stage.lr, betas=stage.betas, eps=stage.eps)
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=stage.eps, fused=True)


def _take_names(groups: list[dict[str, Any]]) -> dict[nn.Parameter, str]:
    """The names of parameters in bfloat16, which `make_optimizer` puts in the groups; no longer in them."""
    named = [(group["params"], group.pop("names")) for group in groups if "names" in group]
    return {parameter: name for parameters, names in named for parameter, name in zip(parameters, names, strict=True)}


def _adamw8bit(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    try:
        return make_adamw8bit(groups, _take_names(groups), lr=stage.lr, betas=stage.betas, eps=stage.eps)
    except ImportError as error:
        raise ConfigError(
            f"stages.{stage.name}.optimizer: adamw8bit needs torchao ({error}): pip install 'eagle-train[gpu]', or use adamw"
        ) from error


def _adamw_host(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    return HostAdamW(groups, lr=stage.lr, betas=stage.betas, eps=stage.eps)


def _muon(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    return Muon(groups, lr=stage.lr, betas=stage.betas, eps=stage.eps)


def _adafactor(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=stage.lr)


@dataclass(frozen=True)
class OptimizerChoice:
    """make(groups, stage): the optimizer. state_bytes: of its state on the device, per parameter of a linear layer's matrix;
    embedding_bytes, vector_bytes: of embeddings and of vectors (`states.Kinds`), where they differ. sharded: whether FSDP2's tensors work.
    bfloat16: whether it rounds bfloat16 weights (`model.weights`) stochastically. host_bytes: of its state in host memory, per
    parameter."""

    make: Callable[[list[dict[str, Any]], StageConfig], torch.optim.Optimizer]
    state_bytes: int
    sharded: bool = True
    bfloat16: bool = False
    host_bytes: int = 0
    embedding_bytes: int | None = None
    vector_bytes: int | None = None

    @property
    def most_bytes(self) -> int:
        """Of the state on the device, per parameter of the kind that takes most."""
        return max(self.state_bytes, self.embedding_bytes or 0, self.vector_bytes or 0)

    def states(self, kinds: Kinds) -> int:
        """Bytes of the state on the device for so many parameters."""
        sizes = (self.state_bytes, self.embedding_bytes, self.vector_bytes)
        return sum(number * (self.state_bytes if size is None else size) for number, size in zip(kinds, sizes, strict=True))


#: Optimizers by the name in `stages.N.optimizer`.
OPTIMIZERS: dict[str, OptimizerChoice] = {
    "adamw": OptimizerChoice(_adamw, 8, bfloat16=True),
    "adamw8bit": OptimizerChoice(_adamw8bit, 2, bfloat16=True, vector_bytes=8),
    "adamw_host": OptimizerChoice(_adamw_host, 0, host_bytes=8),
    "muon": OptimizerChoice(_muon, 4, embedding_bytes=8, vector_bytes=8),
    "adafactor": OptimizerChoice(_adafactor, 0, sharded=False, vector_bytes=4),
}


def check_optimizers(stages: Iterable[StageConfig]) -> None:
    """Raises ConfigError when the package that an optimizer needs is missing: before the first stage, not when a later one begins."""
    for stage in stages:
        OPTIMIZERS[stage.optimizer].make([{"params": [nn.Parameter(torch.zeros(1))]}], stage)


def set_trainable(model: nn.Module, modes: Mapping[Any, str]) -> int:
    """Let the parts be trained as `modes` says (`full`, `lora`, `frozen`, by part; a part that is not in it is frozen).

    `full` trains the parameters of a part and not its adapters, `lora` its adapters alone. Returns the number of elements (of this rank)
    that are trained. Raises ValueError for a parameter that belongs to no part of the model.
    """
    owners = {id(parameter): name for name, part in model.parts().items() for parameter in part.parameters()}  # type: ignore[operator]
    count = 0
    for name, parameter in model.named_parameters():
        if id(parameter) not in owners:
            raise ValueError(
                f"parameter {name} belongs to none of the model's parts, which are {', '.join(dict.fromkeys(owners.values()))}"
            )
        parameter.requires_grad_(modes.get(owners[id(parameter)]) == ("lora" if is_adapter(name) else "full"))
        count += parameter.numel() if parameter.requires_grad else 0
    return count


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer's groups: `params`, `weight_decay`, `matrix` (whether they are matrices of linear layers), and
    where parts or layers have rates of their own, `lr_scale`: the factor of the stage's rate.

    Matrices have weight decay; norms and biases do not.
    """
    rates = _rates(model, stage)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and "weight" in module._parameters}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear -= {id(head.weight)} if head is not None else set()
    linear -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay = rates[id(parameter)]
        matrix = id(parameter) in linear or (is_adapter(name) and parameter.ndim == 2)
        key = (scale, decay if parameter.ndim > 1 else 0.0, matrix and stage.optimizer == "muon")
        groups.setdefault(key, []).append(parameter)
    # With decay first, as in checkpoints from before there were more than two groups.
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], -item[0][1], -item[0][2]))
    scaled = any(scale != 1.0 for scale, _, _ in groups)
    return [
        {"params": parameters, "weight_decay": decay}
        | ({"lr_scale": scale} if scaled else {})
        | ({"matrix": matrix} if stage.optimizer == "muon" else {})
        for (scale, decay, matrix), parameters in ordered
    ]


def _rates(model: nn.Module, stage: StageConfig) -> dict[int, tuple[float, float]]:
    """Factor of the learning rate, and weight decay, of every parameter (by id)."""
    result: dict[int, tuple[float, float]] = {}
    for part, module in model.parts().items():  # type: ignore[operator]
        settings = stage.parts.get(part, PartConfig())
        scale = 1.0 if settings.lr is None else settings.lr / stage.lr
        decay = stage.weight_decay if settings.weight_decay is None else settings.weight_decay
        result |= {id(parameter): (scale, decay) for parameter in module.parameters()}
        if settings.layer_decay == 1.0:
            continue
        blocks = model.blocks(part)  # type: ignore[operator]
        below = [module for module in module.modules() if isinstance(module, (nn.Embedding, nn.Conv2d))]
        for distance, layers in ((len(blocks) + 1, below), *((len(blocks) - index, [block]) for index, block in enumerate(blocks))):
            rate = scale * settings.layer_decay**distance
            result |= {id(parameter): (rate, decay) for layer in layers for parameter in layer.parameters()}
    return result


def has_bfloat16_weights(groups: list[dict[str, Any]]) -> bool:
    """Whether parameters of these groups are kept in bfloat16."""
    return any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"])


def make_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.Optimizer:
    """The optimizer of a stage over the parameters that are trained.

    Raises ConfigError when its package is missing, and for sharded parameters that it does not take.
    """
    choice = OPTIMIZERS[stage.optimizer]
    groups = parameter_groups(model, stage)
    if not choice.sharded and any(hasattr(parameter, "device_mesh") for group in groups for parameter in group["params"]):
        names = ", ".join(name for name, other in OPTIMIZERS.items() if other.sharded)
        raise ConfigError(
            f"stages.{stage.name}.optimizer: {stage.optimizer} does not take sharded parameters, which several ranks and bfloat16 have; "
            f"use one of {names}, or one rank with parallel.dtype: float32"
        )
    if has_bfloat16_weights(groups):
        if not choice.bfloat16:
            names = " or ".join(name for name, other in OPTIMIZERS.items() if other.bfloat16)
            raise ConfigError(
                f"stages.{stage.name}.optimizer: {stage.optimizer} does not round weights stochastically, and rounded to the nearest "
                f"bfloat16 small updates are lost; with model.weights: bfloat16 use {names}"
            )
        if stage.optimizer in ("adamw", "adamw8bit"):
            own = {parameter: name for name, parameter in model.named_parameters()}
            groups = [group | {"names": [own[parameter] for parameter in group["params"]]} for group in groups]
    return choice.make(groups, stage)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, stage: StageConfig) -> float:
    """Set every group's learning rate for optimizer step `step` of `steps`; returns that of the stage.

    A group's `lr_scale` (default: 1) multiplies it, so that parts can learn at rates of their own.
    """
    lr = learning_rate(step, steps, stage)
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):  # torchao's optimizers compile their step, with the rate as an input
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
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
