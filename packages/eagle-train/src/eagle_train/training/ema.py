"""The exponential moving average of the weights that a run trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eagle_model.lora import is_adapter
from eagle_train.config import Config


class MovingAverage:
    """`average = decay * average + (1 - decay) * weights` after every optimizer step, in float32, sharded as the weights.

    tensors: by parameter name, of all parameters that a stage of the run trains; at the start, the weights themselves.
    """

    def __init__(self, model: nn.Module, config: Config, decay: float) -> None:
        names = trained_names(model, config)
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in model.named_parameters() if name in names}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimizer step."""
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                self.tensors[name].lerp_(parameter.to(torch.float32), 1 - self.decay)


def trained_names(model: nn.Module, config: Config) -> set[str]:
    """Names of the parameters that at least one stage trains."""
    result = set()
    owners = {id(parameter): part for part, module in model.parts().items() for parameter in module.parameters()}  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        mode = "lora" if is_adapter(name) else "full"
        if any(stage.modes[owners[id(parameter)]] == mode for stage in config.stages):
            result.add(name)
    return result
