"""What a run needs of each GPU, before one is rented: parameters, and the peak memory of a step over the longest pack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle_train.config import Config, ConfigError
from eagle_train.planning.gpus import Gpu, largest_plan

from .ready import Ready

if TYPE_CHECKING:
    from eagle_kernels import MemoryPlan

GIB = 1 << 30


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


def resources(ready: Ready, gpus: int, gpu: Gpu | None = None) -> Resources:
    """Resources of a run on `gpus` GPUs, one rank each, with `auto` as on `gpu` (None: on one that is large enough). No weights are
    allocated.

    Raises ConfigError when the groups of `parallel` don't divide the GPUs.
    """
    import torch

    from eagle_train.training.activations import resolved
    from eagle_train.training.model import grown_config
    from eagle_train.training.selection import fitting_plans
    from eagle_train.training.step_memory import rank_tokens

    device, given = torch.device("cuda"), for_gpus(ready.config)
    config = resolved(given, device)
    parallel = config.parallel
    if gpus % parallel.group_size:
        raise ConfigError(
            f"parallel: ulysses {parallel.ulysses} x all_gather {parallel.all_gather} = {parallel.group_size} ranks "
            f"don't divide {gpus} GPUs"
        )
    described = grown_config(config, ready.tokenizer)
    tokens = max(rank_tokens(config, stage) for stage in config.stages)
    memory, activations = None, config.model.activations
    if activations != "keep":
        room = math.inf if gpu is None else largest_plan(gpu.gib) * GIB
        plans = fitting_plans(given, described, gpus, room, device)
        memory = max(plans.values(), key=lambda plan: plan.gpu)
        activations = "offload" if memory.host else activations
    return Resources(count_parameters(described), memory, gpus, parallel.dtype, activations, tokens)


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
