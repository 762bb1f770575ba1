"""What a run will need before it is started: memory of each GPU, time of a step, GPU hours, and, where it does not fit, what would help.

Time is FLOPs over a rate: that of the steps which the run has already made, else a share of the GPU's peak. Memory is
`eagle_kernels.plan_memory` of the stage's longest pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagle_train.config import Config, ConfigError
from eagle_train.planning.costs import group_seconds
from eagle_train.planning.gpus import GPUS, Gpu, find_gpu
from eagle_train.training.metrics import Metrics

from .ready import Ready
from .resources import for_gpus

ASSUMED_MFU = 0.4
"""Share of the peak before a step was measured. On four H200 the 8B model with recompute reached 0.39 at 32K and 0.42 at 128K."""
CONTEXT_GIB = 0.5
"""Memory of the CUDA context, which plans leave out."""
FRAGMENTATION = 1.08
"""Reserved over allocated memory, at least: what does not fit with this factor is refused."""
GIB = 1 << 30


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one GPU, and where the number is from."""

    flops: float
    source: str


@dataclass(frozen=True)
class StagePrediction:
    """A stage. gib: memory of each GPU, None where it is not modelled (`keep`); host_gib: of its host for each GPU. seconds: of a step.
    before, after: share of time that data groups wait for one another, if packs were balanced by tokens, and as they are."""

    name: str
    steps: int
    gib: float | None
    host_gib: float
    seconds: float
    before: float
    after: float

    def gpu_hours(self, gpus: int) -> float:
        return self.steps * self.seconds * gpus / 3600


def named_gpu(name: str) -> Gpu:
    """The GPU that a user names. Raises ConfigError for one that is not in the table."""
    gpu = find_gpu(name)
    if gpu is None:
        raise ConfigError(f"--gpu {name}: not in the table; known are {', '.join(gpu.name for gpu in GPUS)}")
    return gpu


def measured_rate(config: Config) -> Rate | None:
    """The median rate of the steps that this run has made; the first step of a stage, which compiles kernels, does not count."""
    path = config.run.folder / "metrics.jsonl"
    rates = [r["tflops"] for r in Metrics(path) if r["kind"] == "step" and r["step"] > 1 and r.get("tflops")]
    if not rates:
        return None
    return Rate(float(np.median(rates)) * 1e12, f"the median of {len(rates)} measured steps in {path}")


def assumed_rate(gpu: Gpu) -> Rate:
    """A share of the peak, where nothing was measured yet."""
    return Rate(ASSUMED_MFU * gpu.tflops * 1e12, f"assumed: {ASSUMED_MFU:.0%} of the bf16 peak of {gpu.name}; measured after two steps")


def predict(ready: Ready, gpus: int, rate: Rate) -> list[StagePrediction]:
    """Every stage on `gpus` GPUs, one rank each. Raises ConfigError and ValueError for GPUs that the groups or packs can't be shared by."""
    from eagle_train.training.model import model_config

    config = for_gpus(ready.config)
    group = config.parallel.group_size
    described = model_config(config, ready.tokenizer)
    stages = []
    for schedule in ready.schedules:
        plan, groups = schedule.plan(0), gpus // group
        assert schedule.costs is not None
        after = plan.spread(groups)
        memory = _memory(config, described, gpus, schedule.stage.name)
        seconds = group_seconds(plan.pack_costs(), schedule.stage.packs_per_step, groups, rate.flops * group)
        stages.append(
            StagePrediction(
                schedule.stage.name,
                schedule.steps,
                None if memory is None else memory.gpu / GIB,
                0.0 if memory is None else memory.host / GIB,
                float(seconds.mean()) if len(seconds) else 0.0,
                schedule.by_tokens().spread(groups, schedule.costs),
                after,
            )
        )
    return stages


def _memory(config: Config, described: Any, gpus: int, stage: str | None = None) -> Any:
    """The memory plan of a stage (default: of the whole run); None for `keep`."""
    from eagle_train.training.activations import planned

    if config.model.activations == "keep":
        return None
    if stage is not None:
        config = config.replaced(stages=[one for one in config.stages if one.name == stage])
    return planned(config, described, gpus)


def needed_gib(gib: float) -> float:
    """Memory of a GPU on which a plan of `gib` GiB runs."""
    return gib * FRAGMENTATION + CONTEXT_GIB


def check_fits(ready: Ready, gpus: int, gpu: Gpu) -> None:
    """Raises ConfigError, with the smallest change that would help, when the longest pack of a stage does not fit on `gpus` GPUs."""
    from eagle_train.training.model import model_config

    config = for_gpus(ready.config)
    described = model_config(config, ready.tokenizer)
    plan = _memory(config, described, gpus)
    if plan is None or needed_gib(plan.gpu / GIB) <= gpu.gib:
        return
    for text, other, count in _changes(config, gpus):
        changed = _memory(other, described, count)
        if changed is not None and needed_gib(changed.gpu / GIB) <= gpu.gib:
            host = f", with {changed.host / GIB:.0f} GiB of host memory for each GPU" if changed.host else ""
            advice = f"the smallest change that helps: {text}{host}"
            break
    else:
        advice = "no change of activations, optimizer, context split, GPUs or max_tokens helps: use a smaller model"
    needs = f"{needed_gib(plan.gpu / GIB):.1f} GiB of each of {gpus} {gpu.name}"
    raise ConfigError(
        f"it does not fit: a step needs {needs} (planned {plan.gpu / GIB:.1f}, peak in {plan.moment}; {FRAGMENTATION - 1:.0%} for "
        f"fragmentation, {CONTEXT_GIB} for the CUDA context), which have {gpu.gib:.1f} GiB; {advice}"
    )


def _changes(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    """Changes of a run from the least to the most intrusive: single ones, two together, and at last shorter contexts."""
    kinds = (_offload, _eight_bit, _share, _more_gpus)
    for kind in kinds:
        yield from kind(config, gpus)
    for first, second in itertools.permutations(kinds, 2):
        for one, changed, count in first(config, gpus):
            for two, both, total in second(changed, count):
                yield f"{one} and {two}", both, total
    yield from _shorter(config, gpus)


def _offload(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    if config.model.activations == "recompute":
        yield "model.activations: offload", config.replaced(model=config.model.replaced(activations="offload")), gpus


def _eight_bit(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    if any(stage.optimizer in ("adamw", "muon") for stage in config.stages):
        stages = [stage.replaced(optimizer="adamw8bit") for stage in config.stages]
        yield "optimizer: adamw8bit in every stage (other steps than adamw's)", config.replaced(stages=stages), gpus


def _share(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    """More ranks for each pack, while there are ranks."""
    parallel = config.parallel
    factor = 2
    while parallel.group_size * factor <= gpus and gpus % (parallel.group_size * factor) == 0:
        split = parallel.replaced(all_gather=parallel.all_gather * factor)
        yield f"parallel.all_gather: {split.all_gather} (packs shared by {split.group_size} GPUs)", config.replaced(parallel=split), gpus
        factor *= 2


def _more_gpus(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    if config.parallel.fsdp:
        for factor in (2, 4, 8, 16, 32):
            yield f"{gpus * factor} GPUs in place of {gpus}", config, gpus * factor


def _shorter(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    most = config.max_tokens // 2
    while most >= 1024:
        stages = [stage.replaced(max_tokens=min(stage.max_tokens, most)) for stage in config.stages]
        yield f"stages.*.max_tokens: at most {most}", config.replaced(stages=stages), gpus
        most //= 2
