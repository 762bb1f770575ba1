"""A training step of the 8B model by what backward finds of its activations, and the accuracy of `plan_memory`.

    python packages/eagle-train/benchmarks/step.py [--only CASE ...] [--out FILE.json]
    python -m torch.distributed.run --standalone --nproc-per-node=4 packages/eagle-train/benchmarks/step.py --only shards

`32k`, `64k` and `128k`: all 28 layers, weights in bf16, forward and backward, with vision tower and connector; one sequence of visual
tokens and 2048 text tokens, which have the labels. Policies run in turn: `recompute`, `offload`, `selective` with what fits the free
memory, and `lean`, which is `selective` with a plan of 40, 48 or 62 GiB at 32K, 64K or 128K (`model.gpu_memory`). `--fp8` runs each
policy also with products of 8-bit floats in the decoder's linear layers, in turn with bf16 and on the same weights. `optimizer` and
`frozen`: the trainer's configuration, which is FSDP2 on one rank, float32 weights and AdamW, with as many layers as fit. `shards`: the
same with all 28 layers over several ranks, each with its own sequence; the worst rank counts. Peaks are recorded at every moment of the
step, so that an error in one part of the plan is visible. `questions`: seven rows about a video of 512 frames as one tree, next to one
row alone. `--rival`: afterwards the same steps by transformers, Liger and flash-attn-4 (`rival_step.py`); `questions` compares with its
step of one row.
"""

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command does
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
import rival_step

from benchmarks.cuda import ceilings
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report, write
from benchmarks.rivals import Absent
from eagle_kernels import MemoryPlan, OffloadEngine, Training, plan_memory
from eagle_model import EagleForConditionalGeneration, PackedBatch, preset
from eagle_model.float8 import Float8Linear
from eagle_model.flops import forward_flops
from eagle_model.layers import linear_layers, replace_layer
from eagle_model.memory import decoder_shape, vision_shape
from eagle_train.config import ParallelConfig, StageConfig
from eagle_train.distributed.sharding import shard_model
from eagle_train.distributed.world import start_world
from eagle_train.planning.gpus import largest_plan
from eagle_train.training.optim import make_optimizer, set_trainable
from eagle_train.training.selection import Selection, fill
from eagle_train.training.speed import peak_flops
from eagle_train.training.step_memory import MLP_ROWS

GIB = 1 << 30
TEXT = 2048
POLICIES = ["recompute", "selective", "lean", "offload"]
LEAN = {32768: 40.0, 65536: 48.0, 131072: 62.0}
"""GiB of a plan by tokens."""
RECIPES = ["rowwise", "rowwise_with_gw_hp"]
FP8 = ", fp8 "
LIBRARIES = ("torch", "triton", "transformers", "flash-attn-4")
METRICS = {
    "ms": Metric("ms", "lower"),
    "tokens_per_s": Metric("", "higher"),
    "over_recompute": Metric("", "none"),
    "speedup_over_bf16": Metric("", "higher"),
    "mfu": Metric("", "higher"),
    "peak_gib": Metric("GiB", "lower"),
    "reserved_gib": Metric("GiB", "lower"),
    "planned_gib": Metric("GiB", "none"),
    "plan_error": Metric("", "none"),
    "host_gib": Metric("GiB", "none"),
    "loss": Metric("", "none"),
    "rows_per_s": Metric("", "higher"),
    "over_one_row": Metric("", "higher"),
}


class Moments:
    """The allocator's peak between marks, and the overall one."""

    def __init__(self, model: Any) -> None:
        self.peaks: dict[str, int] = {}
        self.reserved = 0
        self.current: str | None = None
        self._watch(model)

    def mark(self, name: str | None) -> None:
        if self.current is not None:
            self.peaks[self.current] = max(self.peaks.get(self.current, 0), torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        self.current = name

    def _watch(self, model: Any) -> None:
        """Mark where the parts of the model begin, in forward and in backward."""
        layers = model.blocks("language")

        def at(tensor: torch.Tensor, name: str) -> None:
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.mark(name))

        def connector(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            self.mark("decoder forward")
            at(output, "backward of the vision side")

        def before_layer(index: int) -> Any:
            return lambda _, args: at(args[0], f"backward of layer {index - 1}" if index else "backward of the embedding")

        def before_norm(_: nn.Module, args: Any) -> None:
            self.mark("loss")
            at(args[0], f"backward of layer {len(layers) - 1}")

        model.parts()["connector"].register_forward_hook(connector)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(before_layer(index))
        model.language_model.model.norm.register_forward_pre_hook(before_norm)


class Precisions:
    """The decoder's linear layers with products of bf16, or of 8-bit floats by a recipe; the weights are the same."""

    def __init__(self, model: Any) -> None:
        self.model, self.plain = model, linear_layers(model, "language")

    def set(self, recipe: str) -> None:
        """recipe: empty for bf16."""
        for name, layer in self.plain.items():
            replace_layer(self.model, name, Float8Linear(layer, recipe) if recipe else layer)  # pyright: ignore[reportArgumentType]


def log(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def worst(ms: float, peaks: dict[str, int]) -> tuple[float, dict[str, int]]:
    """The slowest rank's time, and the highest peak of any rank at every moment."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ms, peaks
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (ms, peaks))
    return max(time for time, _ in found), {moment: max(peak[moment] for _, peak in found) for moment in peaks}


def described(layers: int) -> Any:
    return preset("8b", image_token_index=151665, text_config={"num_hidden_layers": layers})


def batch(config: Any, tokens: int) -> PackedBatch:
    """One sequence of visual tokens and TEXT text tokens, which have the labels."""
    size, vocab = config.tile_size, config.text_config.vocab_size
    tiles = (tokens - TEXT) // config.tokens_per_tile
    images = tiles * config.tokens_per_tile
    ids = torch.randint(0, 150000, (tokens,), device="cuda")
    ids[:images] = config.image_token_index
    targets = torch.full((tokens,), -100, device="cuda")
    targets[-TEXT:] = torch.randint(0, vocab, (TEXT,), device="cuda")
    return PackedBatch(
        input_ids=ids,
        targets=targets,
        position_ids=torch.arange(tokens, device="cuda"),
        token_weights=torch.ones(tokens, device="cuda"),
        cu_seqlens=(0, tokens),
        tiles=torch.randint(0, 256, (tiles, size, size, 3), device="cuda", dtype=torch.uint8),
        visual_index=torch.arange(images, device="cuda"),
        num_kept=TEXT,
        label_weight=float(TEXT),
        denominator=torch.tensor(float(TEXT), device="cuda"),
    )


def questions(config: Any, tokens: int, branches: int = 7, each: int = 256) -> tuple[PackedBatch, PackedBatch]:
    """Rows about one video of `tokens` visual tokens, `each` tokens of text each with labels: as one tree, and the first of them alone."""
    size, vocab = config.tile_size, config.text_config.vocab_size
    tiles = torch.randint(0, 256, (tokens // config.tokens_per_tile, size, size, 3), device="cuda", dtype=torch.uint8)

    def pack(number: int) -> PackedBatch:
        prefix, text = tokens, number * each
        ids = torch.cat([torch.full((prefix,), config.image_token_index), torch.randint(0, 150000, (text,))]).cuda()
        targets = torch.full((prefix + text,), -100)
        targets[prefix:] = torch.randint(0, vocab, (text,))
        targets[prefix::each] = -100  # the first token of a branch follows the prefix
        positions = torch.cat([torch.arange(prefix), *[torch.arange(prefix, prefix + each)] * number])
        kept = int((targets >= 0).sum())
        tree = number > 1
        return PackedBatch(
            input_ids=ids,
            targets=targets.cuda(),
            position_ids=positions.cuda(),
            token_weights=torch.ones(prefix + text, device="cuda"),
            cu_seqlens=(0, *range(prefix, prefix + text + 1, each)) if tree else (0, prefix + text),
            tiles=tiles,
            visual_index=torch.arange(prefix, device="cuda"),
            num_kept=kept,
            label_weight=float(kept),
            denominator=torch.tensor(float(kept), device="cuda"),
            prefixes=(-1, *[0] * number) if tree else (),
        )

    return pack(branches), pack(1)


def shared_media(result: Result, tokens: int, rounds: int, layers: int, branches: int = 7) -> None:
    """Seven questions about one video in one step, next to a step of one question."""
    model = make(layers, torch.bfloat16)
    moments = Moments(model)
    model.set_activation_checkpointing("recompute")
    packs = dict(zip(("tree", "one row"), questions(model.config, tokens, branches), strict=True))
    times: dict[str, list[float]] = {name: [] for name in packs}
    peaks = {}
    for pack in questions(model.config, 16 * model.config.tokens_per_tile, branches):
        step(model, moments, pack, None)  # compiles
    for name in list(packs) * rounds:
        torch.cuda.empty_cache()
        moments.peaks, moments.current = {}, None
        ms, loss = step(model, moments, packs[name], None)
        times[name].append(ms)
        peaks[name] = max(moments.peaks.values())
        log(f"questions, {name}: {ms:.0f} ms, loss {loss:.4f}, peak {peaks[name] / GIB:.2f} GiB")
    rates = {name: (branches if name == "tree" else 1) / min(times[name]) * 1e3 for name in packs}
    for name in packs:
        more = {"over_one_row": rates[name] / rates["one row"]}
        details = {"tokens": packs[name].input_ids.numel(), "all_ms": times[name]}
        result.add(f"{branches} questions, {tokens} visual tokens, {name}", details=details, ms=min(times[name]), rows_per_s=rates[name],
                   peak_gib=peaks[name] / GIB, **more)  # fmt: skip


def step(model: Any, moments: Moments, inputs: PackedBatch, optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    """(milliseconds, loss) of one step; the gradients are freed."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    moments.mark("vision forward")
    loss = model(inputs).loss
    moments.mark("backward of the head")
    loss.backward()
    moments.mark("optimizer")
    if optimizer is not None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moments.mark(None)
    torch.cuda.synchronize()
    ms = (time.perf_counter() - begin) * 1e3
    model.zero_grad(set_to_none=True)
    return ms, loss.item()


def run(
    result: Result,
    name: str,
    model: Any,
    moments: Moments,
    tokens: int,
    order: list[str],
    plans: dict[str, MemoryPlan],
    optimizer: torch.optim.Optimizer | None = None,
    chosen: dict[str, Selection] | None = None,
    profile: bool = False,
) -> None:
    """Steps with the policies in `order`; one case per policy, with its fastest step and the peaks of its last one.

    A policy's name may end in FP8 and a recipe. profile: one more step of each, with the milliseconds of every kernel.
    """
    config, chosen, precisions = model.config, chosen or {}, Precisions(model)
    inputs = batch(config, tokens)
    begin = time.perf_counter()
    engine = OffloadEngine(plans["offload"].host + (1 << 20)) if "offload" in order else None
    log(f"{name}: engine of {plans['offload'].host / GIB:.1f} GiB in {time.perf_counter() - begin:.1f} s")
    times: dict[str, list[float]] = {policy: [] for policy in order}
    peaks: dict[str, dict[str, int]] = {}
    reserved: dict[str, int] = {}
    losses: dict[str, float] = {}
    for policy in order:
        plain_policy, _, recipe = policy.partition(FP8)
        set_policy(model, plain_policy, engine, chosen)
        precisions.set(recipe)
        torch.cuda.empty_cache()
        moments.peaks, moments.reserved, moments.current = {}, 0, None
        try:
            ms, losses[policy] = step(model, moments, inputs, optimizer)
        except RuntimeError as error:  # out of memory too; the others go on
            if not recipe:
                raise
            log(f"{name} {policy}: {type(error).__name__}: {str(error)[:400]}")
            model.zero_grad(set_to_none=True)
            continue
        ms, peak = worst(ms, moments.peaks)
        times[policy].append(ms)
        peaks[policy], reserved[policy] = peak, moments.reserved
        log(f"{name} {policy}: {ms:.0f} ms, loss {losses[policy]:.4f}, peak {max(peak.values()) / GIB:.2f} GiB")
    kernels = {}
    for policy in times if profile else ():
        set_policy(model, policy.partition(FP8)[0], engine, chosen)
        precisions.set(policy.partition(FP8)[2])
        try:
            kernels[policy] = kernel_times(lambda: step(model, moments, inputs, optimizer))
        except Exception as error:  # what was measured is not lost to the profiler
            log(f"{name} {policy}: no profile: {error}")
            continue
        log(f"{name} {policy}: {sum(kernels[policy].values()):.0f} ms in kernels")
        for kernel, spent in list(kernels[policy].items())[:25]:
            log(f"  {spent:8.1f} ms  {kernel}")
    precisions.set("")
    for policy in (policy for policy, taken in times.items() if taken):
        plain_policy = policy.partition(FP8)[0]
        plan = plans[plain_policy]
        peak, ms = max(peaks[policy].values()), min(times[policy])
        metrics = {
            "ms": ms, "tokens_per_s": tokens / ms * 1e3, "peak_gib": peak / GIB, "reserved_gib": reserved[policy] / GIB,
            "planned_gib": plan.gpu / GIB, "plan_error": plan.gpu / peak - 1, "host_gib": plan.host / GIB, "loss": losses[policy],
        }  # fmt: skip
        if (peak_rate := peak_flops(torch.device("cuda"), "bfloat16")) is not None:
            metrics["mfu"] = model_flops(config, tokens) / (ms * 1e-3) / peak_rate
        if "recompute" in times:
            metrics["over_recompute"] = ms / min(times["recompute"]) - 1
        if policy != plain_policy:
            metrics["speedup_over_bf16"] = min(times[plain_policy]) / ms
        details = {
            "kernels_ms": kernels.get(policy),
            "kept": chosen[plain_policy].text if plain_policy in chosen else None,
            "tokens": tokens, "layers": config.text_config.num_hidden_layers, "all_ms": times[policy], "planned_moment": plan.moment,
            "peaks_gib": {moment: size / GIB for moment, size in peaks[policy].items()},
            "planned_moments_gib": {moment: sum(parts.values()) / GIB for moment, parts in plan.moments.items()},
        }  # fmt: skip
        result.add(f"{name}, {tokens} tokens, {details['layers']} layers, {policy}", details=details, **metrics)


def kernel_times(function: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that each kernel takes in one call, the longest first; names are cut."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key[:100]
        times[name] = times.get(name, 0.0) + event.self_device_time_total / 1e3
    longest = sorted(((name, spent) for name, spent in times.items() if spent > 0), key=lambda one: -one[1])
    return dict(longest[:60])


def set_policy(model: Any, policy: str, engine: OffloadEngine | None, chosen: dict[str, Selection]) -> None:
    if policy in chosen:
        model.set_activation_checkpointing("selective", **chosen[policy].options)
    else:
        model.set_activation_checkpointing(policy, engine if policy == "offload" else None)


def model_flops(config: Any, tokens: int) -> float:
    """FLOPs of forward and backward, without recomputation."""
    flops = forward_flops(config)
    assert flops is not None
    tiles = (tokens - TEXT) // config.tokens_per_tile
    return 3 * (flops.token * tokens + flops.pair * tokens * (tokens + 1) / 2 + flops.label * TEXT + (flops.tile + flops.connector) * tiles)


def make(layers: int, dtype: torch.dtype, kind: Callable[[Any], Any] = EagleForConditionalGeneration) -> Any:
    """A model with random weights, made on the GPU, where filling 8 billion values takes a second."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return kind(described(layers)).train()
    finally:
        torch.set_default_dtype(before)


def rival(result: Result, cases: list[tuple[str, int]], rounds: int, layers: int, out: Path | None) -> None:
    """The same steps by public packages; a case that fails does not stop the others."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        model = make(layers, torch.bfloat16, rival_step.make)
    except Exception as error:
        result.absent += [Absent(name, rival_step.NAME, f"{type(error).__name__}: {error}"[:200]) for name, _ in cases]
        return
    config = described(layers)
    for name, tokens in cases:
        try:
            times, loss = [], 0.0
            inputs = questions(config, tokens, 1)[1] if name == "questions" else batch(config, tokens)
            for _ in range(rounds + 1):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
                begin = time.perf_counter()
                found = rival_step.loss(model, inputs)
                found.backward()
                torch.cuda.synchronize()
                times.append((time.perf_counter() - begin) * 1e3)
                loss = found.item()
                model.zero_grad(set_to_none=True)
                log(
                    f"{name} {rival_step.NAME}: {times[-1]:.0f} ms, loss {loss:.4f}, peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB"
                )
            ms, peak = min(times), torch.cuda.max_memory_allocated()
            more = {"rows_per_s": 1e3 / ms} if name == "questions" else {"tokens_per_s": tokens / ms * 1e3}
            details = {"tokens": inputs.input_ids.numel(), "all_ms": times}
            result.add(f"{name}, {tokens} tokens", rival_step.NAME, details=details, ms=ms, peak_gib=peak / GIB, loss=loss, **more)
        except Exception as error:
            log(f"{name} {rival_step.NAME}: {type(error).__name__}: {str(error)[:300]}")
            result.absent.append(Absent(name, rival_step.NAME, f"{type(error).__name__}: {error}"[:200]))
            model.zero_grad(set_to_none=True)
        if out is not None:
            write(result, out)


def plain(
    result: Result, cases: list[tuple[str, int, list[str]]], layers: int, out: Path | None, recipes: list[str], profile: bool
) -> None:
    model = make(layers, torch.bfloat16)
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
        gc.collect()
        torch.cuda.empty_cache()


def trained(result: Result, name: str, tokens: int, layers: int, frozen: bool, order: list[str]) -> None:
    """FSDP2 as in the trainer: float32 weights and states, computation in bf16."""
    parallel = ParallelConfig(dtype="bfloat16")
    world = start_world(parallel, "cuda")
    model = make(layers, torch.float32)
    config = model.config
    stage = StageConfig(name=name, max_tokens=tokens, train=["connector", "language"] if frozen else ["vision", "connector", "language"])
    set_trainable(model, stage.modes)
    model = shard_model(model, world, parallel)
    optimizer = make_optimizer(model, stage)
    shape, vision = decoder_shape(config), vision_shape(config, tokens - TEXT)
    vision = dataclasses.replace(vision, training=Training("frozen" if frozen else "full"))
    widths: dict[str, Any] = {"weight_bytes": 4, "gradient_bytes": 4, "optimizer_bytes": 8, "compute_bytes": 2, "shards": world.size}
    plans = {
        policy: plan_memory(shape, tokens, vision=vision, labelled=TEXT, offload=policy == "offload", **widths)
        for policy in ("recompute", "offload")
    }
    run(result, name, model, Moments(model), tokens, order, plans, optimizer)
    world.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["32k", "64k", "128k", "optimizer", "frozen"], metavar="CASE")
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES, help="of 32k, 64k and 128k")
    parser.add_argument("--rounds", type=int, default=2, help="steps of every policy")
    parser.add_argument("--rival", action="store_true", help="also 32k, 64k, 128k and questions by public packages")
    parser.add_argument(
        "--fp8",
        nargs="*",
        choices=RECIPES,
        metavar="RECIPE",
        help=f"of 32k, 64k and 128k, also with 8-bit floats: {', '.join(RECIPES)} (both)",
    )
    parser.add_argument("--profile", action="store_true", help="of 32k, 64k and 128k: one more step each, with the time of every kernel")
    add_out(parser)
    options = parser.parse_args()
    if unknown := set(options.only) - {"32k", "64k", "128k", "optimizer", "frozen", "shards", "questions"}:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    main_rank = int(os.environ.get("RANK", "0")) == 0
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    result = Result("eagle-train/step", environment(LIBRARIES, gpus=ranks), METRICS, settings={"only": options.only, "ranks": ranks})
    if ranks == 1:
        result.ceilings = ceilings()
        torch.cuda.empty_cache()
    # The first step of a length compiles and fills the allocator; the fastest of each policy counts.
    each = options.policies * options.rounds
    cases = [("32k", 32768, each), ("64k", 65536, each), ("128k", 131072, each)]
    cases = [case for case in cases if case[0] in options.only]
    if cases:
        recipes = [] if options.fp8 is None else options.fp8 or RECIPES
        plain(result, cases, 28, options.out, recipes, options.profile)
    if "questions" in options.only:
        shared_media(result, 131072, options.rounds, 28)
        gc.collect()
    if options.rival and ranks == 1:
        compared = [*((name, tokens) for name, tokens, _ in cases), *([("questions", 131072)] if "questions" in options.only else [])]
        rival(result, compared, options.rounds, 28, options.out)
        gc.collect()
    for name, layers, frozen in (("optimizer", 12, False), ("frozen", 16, True), ("shards", 28, False)):
        if name in options.only:
            if main_rank and options.out is not None:
                write(result, options.out)  # the cases so far, in case the next one runs out of memory
            gc.collect()
            torch.cuda.empty_cache()
            # AdamW's states are allocated in the first step, after its peak: the last step of each policy counts.
            trained(result, name, 32768, layers, frozen, ["recompute", "offload", "recompute"])
    if main_rank:
        report(result, options.out)


if __name__ == "__main__":
    main()
