"""What a run will need before it is started: memory of each GPU, time of a step, GPU hours, and, where it does not fit, what would help.

Time is FLOPs over a rate: that of the steps which the run has already made, else a share of the GPU's peak. FLOPs of `model.fp8` count as
those of bfloat16 that take the same time, also in a measured rate. Memory is
`eagle_kernels.plan_memory` of the stage's longest pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagle_train.config import Config, ConfigError, StageConfig
from eagle_train.planning.costs import CostModel, group_seconds
from eagle_train.planning.gpus import CONTEXT_GIB, FRAGMENTATION, GPUS, Gpu, find_gpu, largest_plan
from eagle_train.planning.stages import StageSchedule
from eagle_train.training.metrics import Metrics
from eagle_train.training.sizes import stage_costs

from .ready import Ready
from .resources import for_gpus

ASSUMED_MFU = 0.4
"""Share of the peak before a step was measured. On four H200 the 8B model with recompute reached 0.39 at 32K and 0.42 at 128K."""
GIB = 1 << 30


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one GPU, and where the number is from."""

    flops: float
    source: str


@dataclass(frozen=True)
class StagePrediction:
    """A stage. trained: parameters that it trains. gib: memory of each GPU, None where it is not modelled (`keep`); host_gib: of its host
    for each GPU. seconds: of a step. before, after: share of time that data groups wait for one another, if packs were balanced by
    tokens, and as they are. kept: what `selective` keeps, in words."""

    name: str
    steps: int
    trained: int
    gib: float | None
    host_gib: float
    seconds: float
    before: float
    after: float
    kept: str | None = None

    def gpu_hours(self, gpus: int) -> float:
        return self.steps * self.seconds * gpus / 3600


def named_gpu(name: str) -> Gpu:
    """The GPU that a user names. Raises ConfigError for one that is not in the table."""
    gpu = find_gpu(name)
    if gpu is None:
        raise ConfigError(f"--gpu {name}: not in the table; known are {', '.join(gpu.name for gpu in GPUS)}")
    return gpu


def measured_rate(config: Config, weights: Mapping[str, float] | None = None) -> Rate | None:
    """The median rate of the steps that this run has made; the first step of a stage, which compiles kernels, does not count.

    weights: of a stage's FLOPs in time, by its name (`_time_weights`), for steps made with the `model.fp8` that the run has now.
    """
    path = config.run.folder / "metrics.jsonl"
    steps = [r for r in Metrics(path) if r["kind"] == "step" and r["step"] > 1 and r.get("tflops")]
    rates = [r["tflops"] * (weights or {}).get(str(r.get("stage")), 1.0) for r in steps]
    if not rates:
        return None
    return Rate(float(np.median(rates)) * 1e12, f"the median of {len(rates)} measured steps in {path}")


def assumed_rate(gpu: Gpu) -> Rate:
    """A share of the peak, where nothing was measured yet."""
    return Rate(ASSUMED_MFU * gpu.tflops * 1e12, f"assumed: {ASSUMED_MFU:.0%} of the bf16 peak of {gpu.name}; measured after two steps")


@dataclass(frozen=True)
class Prediction:
    """Every stage on `gpus` GPUs that compute at `rate`, one rank each."""

    gpus: int
    rate: Rate
    stages: list[StagePrediction]


def predict(ready: Ready, gpus: int, gpu: Gpu) -> Prediction:
    """At the rate that the run was measured at, else at an assumed one.

    Raises ConfigError for `model.fp8` that the GPU or the model can't have, and as `predict_stages`.
    """
    _check_fp8(ready, gpu)
    rate = rate_of(ready, gpu)
    return Prediction(gpus, rate, predict_stages(ready, gpus, rate, gpu))


def rate_of(ready: Ready, gpu: Gpu) -> Rate:
    """The rate that the run was measured at, else the assumed one."""
    return measured_rate(ready.config, _time_weights(ready)) or assumed_rate(gpu)


def _timed(ready: Ready, schedule: StageSchedule) -> CostModel:
    """Costs of a stage's packs in time."""
    return stage_costs(ready.config, schedule.stage, ready.sizes, ready.tokenizer, timed=True)


def _time_weights(ready: Ready) -> dict[str, float]:
    """Of every stage, by its name, what an average FLOP of its packs costs in time; 1 without `model.fp8`."""
    weights = {}
    for schedule in ready.schedules if ready.config.model.fp8 else ():
        plan = schedule.plan(0)
        weights[schedule.stage.name] = float(plan.pack_costs(_timed(ready, schedule)).sum() / max(plan.pack_costs().sum(), 1.0))
    return weights


def _check_fp8(ready: Ready, gpu: Gpu) -> None:
    """Raises ConfigError when `model.fp8` is set and the GPU has no such products, or the model has layers of other sizes."""
    from eagle_kernels.ops.float8 import CAPABILITY
    from eagle_train.distributed.precision import check_fp8_gpu
    from eagle_train.training.build import empty_model, use_fp8

    config = for_gpus(ready.config)
    if config.model.fp8:
        check_fp8_gpu(config, gpu.name, gpu.capability, able=gpu.capability >= CAPABILITY)
        use_fp8(config, empty_model(config, ready.tokenizer, weights=False).model)


def predict_stages(ready: Ready, gpus: int, rate: Rate, gpu: Gpu | None = None) -> list[StagePrediction]:
    """Every stage on `gpus` GPUs, one rank each; `selective` fills the memory of `gpu` (None: it keeps nothing).

    Raises ConfigError for GPUs that the groups or packs can't be shared by.
    """
    import torch

    from eagle_train.training.activations import activation_mode, with_activations
    from eagle_train.training.model import grown_config
    from eagle_train.training.step_memory import stage_plans, trained_parameters

    config = for_gpus(ready.config)
    mode = activation_mode(config, torch.device("cuda"))
    group = config.parallel.group_size
    described = grown_config(config, ready.tokenizer)
    plans = stage_plans(with_activations(config, mode), described, gpus) if mode != "keep" else {}
    stages = []
    for schedule in ready.schedules:
        plan, groups = schedule.plan(0), gpus // group
        assert schedule.costs is not None
        after = plan.spread(groups)
        memory, kept = plans.get(schedule.stage.name), None
        if gpu is not None and mode in ("selective", "offload"):
            memory, kept = _selected(config, described, gpus, schedule.stage, gpu)
        seconds = group_seconds(plan.pack_costs(_timed(ready, schedule)), schedule.stage.packs_per_step, groups, rate.flops * group)
        stages.append(
            StagePrediction(
                schedule.stage.name,
                schedule.steps,
                sum(trained_parameters(config, schedule.stage, described).values()),
                None if memory is None else memory.gpu / GIB,
                0.0 if memory is None else memory.host / GIB,
                float(seconds.mean()) if len(seconds) else 0.0,
                schedule.by_tokens().spread(groups, schedule.costs),
                after,
                kept,
            )
        )
    return stages


def _selected(config: Config, described: Any, gpus: int, stage: StageConfig, gpu: Gpu) -> tuple[Any, str]:
    """The memory plan of a stage with what is kept on an empty GPU, and what that is."""
    import torch

    from eagle_train.training.selection import choose

    room = min(largest_plan(gpu.gib), config.model.gpu_memory or gpu.gib)
    chosen = choose(config, stage, described, gpus, room * GIB, torch.device("cuda"))
    return chosen.plan, chosen.text


def needed_gib(gib: float) -> float:
    """Memory of a GPU on which a plan of `gib` GiB runs."""
    return gib * FRAGMENTATION + CONTEXT_GIB


def check_fits(ready: Ready, gpus: int, gpu: Gpu) -> None:
    """Raises ConfigError, with the smallest change that would help, when the longest pack of a stage does not fit on `gpus` GPUs.

    With `model.activations: keep` a step needs more than the plan, so only what cannot fit is refused, as by training.
    """
    import torch

    from eagle_train.training.activations import resolved
    from eagle_train.training.memory import check_limit, smallest_change
    from eagle_train.training.model import grown_config
    from eagle_train.training.selection import fitting_plans

    config = for_gpus(ready.config)
    described = grown_config(config, ready.tokenizer)
    check_limit(config, described, gpus, torch.device("cuda"))
    room = largest_plan(gpu.gib) * GIB
    plans = fitting_plans(config, described, gpus, room, torch.device("cuda"))
    plan = max(plans.values(), key=lambda one: one.gpu)
    if plan.gpu <= room:
        return
    advice = smallest_change(resolved(config, torch.device("cuda")), described, gpus, room)
    least = "at least " if config.model.activations == "keep" else ""
    needs = f"{least}{needed_gib(plan.gpu / GIB):.1f} GiB of each of {gpus} {gpu.name}"
    raise ConfigError(
        f"it does not fit: a step needs {needs} (planned {plan.gpu / GIB:.1f}, peak in {plan.moment}; {FRAGMENTATION - 1:.0%} for "
        f"fragmentation, {CONTEXT_GIB} for the CUDA context), which have {gpu.gib:.1f} GiB. {advice}"
    )
