"""What a run needs of each GPU, before one is rented: parameters, and the peak memory of a step over the longest pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle_train.config import Config, ConfigError

from .ready import Ready

if TYPE_CHECKING:
    from eagle_kernels import MemoryPlan


@dataclass(frozen=True)
class Resources:
    """parameters: of the model. memory: of one rank, from `eagle_kernels.plan_memory`; None where it is not modelled (`keep`), and
    the least with `selective`.

    gpus, dtype, activations, tokens: what the plan of memory assumes; tokens of a pack are those of one rank of a context group.
    """

    parameters: int
    memory: MemoryPlan | None
    gpus: int
    dtype: str
    activations: str
    tokens: int


def resources(ready: Ready, gpus: int) -> Resources:
    """Resources of a run on `gpus` GPUs, one rank each, with `auto` resolved as on a GPU. No weights are allocated.

    Raises ConfigError when the groups of `parallel` don't divide the GPUs.
    """
    import torch

    from eagle_train.training.activations import resolved
    from eagle_train.training.model import grown_config
    from eagle_train.training.step_memory import planned, rank_tokens

    config = resolved(for_gpus(ready.config), torch.device("cuda"))
    parallel = config.parallel
    if gpus % parallel.group_size:
        raise ConfigError(
            f"parallel: ulysses {parallel.ulysses} x all_gather {parallel.all_gather} = {parallel.group_size} ranks "
            f"don't divide {gpus} GPUs"
        )
    described = grown_config(config, ready.tokenizer)
    tokens = max(rank_tokens(config, stage) for stage in config.stages)
    memory = planned(config, described, gpus) if config.model.activations != "keep" else None
    return Resources(count_parameters(described), memory, gpus, parallel.dtype, config.model.activations, tokens)


def for_gpus(config: Config) -> Config:
    """The configuration with the dtype that `auto` is on a GPU."""
    if config.parallel.dtype == "auto":
        config = config.replaced(parallel=config.parallel.replaced(dtype="bfloat16"))
    return config


def count_parameters(described: Any) -> int:
    """Parameters of the model that an EagleConfig describes, built without memory for them."""
    import torch

    from eagle_model.eagle import EagleForConditionalGeneration

    with torch.device("meta"):
        model = EagleForConditionalGeneration(described)
    return sum(parameter.numel() for parameter in model.parameters())
