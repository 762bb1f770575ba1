"""Steps of one sequence by what backward finds of its activations, each with the plan of `plan_memory`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.results import Result, write
from eagle_kernels import MemoryPlan, OffloadEngine, plan_memory
from eagle_model import PackedBatch
from eagle_model.float8 import Float8Linear
from eagle_model.flops import forward_flops
from eagle_model.layers import linear_layers, replace_layer
from eagle_model.memory import decoder_shape, vision_shape
from eagle_train.planning.gpus import largest_plan
from eagle_train.training.selection import Selection, fill
from eagle_train.training.speed import peak_flops
from eagle_train.training.step_memory import MLP_ROWS

from .inputs import TEXT, described, make, one_sequence
from .measured import GIB, Moments, kernel_times, log, milliseconds, release, step

POLICIES = ["recompute", "selective", "lean", "offload"]
LEAN = {32768: 40.0, 65536: 48.0, 131072: 62.0}
"""GiB of a plan by tokens."""
FP8 = ", fp8 "
"""Between a policy and the recipe of its 8-bit products."""


class Taken(NamedTuple):
    """A measured step: of the slowest rank, with the highest peak of any rank at every moment."""

    ms: float
    loss: float
    peaks: dict[str, int]
    reserved: int


class Policies:
    """Sets how the next steps of a model compute: a policy, and the precision of the decoder's linear layers, whose weights are the same.

    chosen: what `selective` policies keep, by name. A policy's name may end in FP8 and a recipe.
    """

    def __init__(self, model: Any, chosen: Mapping[str, Selection], plans: Mapping[str, MemoryPlan], order: list[str]) -> None:
        self.model, self.chosen, self._plain = model, chosen, linear_layers(model, "language")
        self._engine: OffloadEngine | None = None
        if any(one.partition(FP8)[0] == "offload" for one in order):
            taken = milliseconds(lambda: self._make_engine(plans["offload"].host))
            log(f"engine of {plans['offload'].host / GIB:.1f} GiB in {taken / 1e3:.1f} s")

    def _make_engine(self, host: int) -> None:
        self._engine = OffloadEngine(host + (1 << 20))

    def set(self, policy: str) -> None:
        name, _, recipe = policy.partition(FP8)
        if name in self.chosen:
            self.model.set_activation_checkpointing("selective", **self.chosen[name].options)
        else:
            self.model.set_activation_checkpointing(name, self._engine if name == "offload" else None)
        self.set_precision(recipe)

    def set_precision(self, recipe: str) -> None:
        """recipe: of 8-bit products; empty for bf16."""
        for name, layer in self._plain.items():
            replace_layer(self.model, name, Float8Linear(layer, recipe) if recipe else layer)  # pyright: ignore[reportArgumentType]


def run(
    result: Result,
    name: str,
    model: Any,
    moments: Moments,
    tokens: int,
    order: list[str],
    plans: Mapping[str, MemoryPlan],
    optimizer: torch.optim.Optimizer | None = None,
    chosen: Mapping[str, Selection] | None = None,
    profile: bool = False,
) -> None:
    """Steps with the policies in `order`; one case per policy, with its fastest step and the peaks of its last one.

    profile: one more step of each, with the milliseconds of every kernel.
    """
    chosen, inputs = chosen or {}, one_sequence(model.config, tokens)
    policies = Policies(model, chosen, plans, order)
    taken: dict[str, list[Taken]] = {}
    for policy in order:
        policies.set(policy)
        try:
            found = _step(model, moments, inputs, optimizer)
        except RuntimeError as error:  # out of memory too; the others go on
            if FP8 not in policy:
                raise
            log(f"{name} {policy}: {type(error).__name__}: {str(error)[:400]}")
            model.zero_grad(set_to_none=True)
            continue
        taken.setdefault(policy, []).append(found)
        log(f"{name} {policy}: {found.ms:.0f} ms, loss {found.loss:.4f}, peak {max(found.peaks.values()) / GIB:.2f} GiB")
    kernels = {}
    for policy in taken if profile else ():
        policies.set(policy)
        try:
            kernels[policy] = kernel_times(lambda: step(model, moments, inputs, optimizer))
        except Exception as error:  # what was measured is not lost to the profiler
            log(f"{name} {policy}: no profile: {error}")
            continue
        log(f"{name} {policy}: {sum(kernels[policy].values()):.0f} ms in kernels")
        for kernel, spent in list(kernels[policy].items())[:25]:
            log(f"  {spent:8.1f} ms  {kernel}")
    policies.set_precision("")
    fastest = {policy: min(one.ms for one in steps) for policy, steps in taken.items()}
    for policy, steps in taken.items():
        plain_policy = policy.partition(FP8)[0]
        plan, details = plans[plain_policy], {"kernels_ms": kernels.get(policy), "all_ms": [one.ms for one in steps]}
        metrics = _figures(model.config, tokens, fastest[policy], steps[-1], plan)
        if "recompute" in fastest:
            metrics["over_recompute"] = fastest[policy] / fastest["recompute"] - 1
        if policy != plain_policy and plain_policy in fastest:
            metrics["speedup_over_bf16"] = fastest[plain_policy] / fastest[policy]
        layers = model.config.text_config.num_hidden_layers
        details |= {
            "kept": chosen[plain_policy].text if plain_policy in chosen else None, "tokens": tokens, "layers": layers,
            "peaks_gib": {moment: size / GIB for moment, size in steps[-1].peaks.items()}, "planned_moment": plan.moment,
            "planned_moments_gib": {moment: sum(parts.values()) / GIB for moment, parts in plan.moments.items()},
        }  # fmt: skip
        result.add(f"{name}, {tokens} tokens, {layers} layers, {policy}", details=details, **metrics)


def _step(model: Any, moments: Moments, inputs: PackedBatch, optimizer: torch.optim.Optimizer | None) -> Taken:
    moments.begin()
    ms, loss = step(model, moments, inputs, optimizer)
    peaks, reserved = moments.peaks, moments.reserved
    if dist.is_initialized() and dist.get_world_size() > 1:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (ms, peaks))
        ms, peaks = max(time for time, _ in found), {moment: max(peak[moment] for _, peak in found) for moment in peaks}
    return Taken(ms, loss, peaks, reserved)


def _figures(config: Any, tokens: int, ms: float, last: Taken, plan: MemoryPlan) -> dict[str, float]:
    peak = max(last.peaks.values())
    figures = {
        "ms": ms, "tokens_per_s": tokens / ms * 1e3, "loss": last.loss, "peak_gib": peak / GIB, "reserved_gib": last.reserved / GIB,
        "planned_gib": plan.gpu / GIB, "plan_error": plan.gpu / peak - 1, "host_gib": plan.host / GIB,
    }  # fmt: skip
    if (peak_rate := peak_flops(torch.device("cuda"), "bfloat16")) is not None:
        figures["mfu"] = model_flops(config, tokens) / (ms * 1e-3) / peak_rate
    return figures


def model_flops(config: Any, tokens: int) -> float:
    """FLOPs of forward and backward, without recomputation."""
    flops = forward_flops(config)
    assert flops is not None
    tiles = (tokens - TEXT) // config.tokens_per_tile
    return 3 * (flops.token * tokens + flops.pair * tokens * (tokens + 1) / 2 + flops.label * TEXT + (flops.tile + flops.connector) * tiles)


def measure(
    result: Result, cases: list[tuple[str, int, list[str]]], layers: int, out: Path | None, recipes: list[str], profile: bool
) -> None:
    """Cases (name, tokens, policies in turn) of the whole model in bf16, forward and backward."""
    model = make(described(layers), torch.bfloat16)
    moments = Moments(model)
    for name, tokens, order in cases:
        vision = vision_shape(model.config, tokens - TEXT)
        shape = decoder_shape(model.config)
        plan = partial(plan_memory, shape, tokens, vision=vision, labelled=TEXT)
        room = largest_plan((torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB) * GIB
        limits = {"selective": room, "lean": LEAN[tokens] * GIB}
        blocks = None if recipes else MLP_ROWS  # products of 8-bit floats know no blocks
        chosen = {policy: fill(plan, limit, shape, vision, tokens, mlp_rows=blocks) for policy, limit in limits.items()}
        for policy in chosen:
            log(f"{name} {policy}: {chosen[policy].text}")
        plans = {"recompute": plan(), "offload": plan(offload=True)} | {policy: found.plan for policy, found in chosen.items()}
        order = [policy for policy in order if plans[policy].gpu <= room]
        order = [name for policy in order for name in (policy, *(f"{policy}{FP8}{recipe}" for recipe in recipes))]
        run(result, name, model, moments, tokens, order, plans, chosen=chosen, profile=profile)
        if out is not None:
            write(result, out)  # a later case may run out of time or memory
        release()
