"""A training step of the 8B model on one GPU: what it costs to keep checkpoints on the host, and whether `plan_memory` is right.

python benchmarks/step.py [--out FILE] [--only CASE ...]   (CASE: 32k, 128k, optimizer, frozen)
python -m torch.distributed.run --standalone --nproc-per-node=4 benchmarks/step.py --only shards

`32k` and `128k`: all 28 layers, weights in bf16, forward + backward, vision tower and connector included, one sequence of image tokens but
for 2048 of text, which carry the labels; the two policies take turns. `optimizer` and `frozen`: the trainer's own way, that is FSDP2 on one
rank, float32 weights and AdamW, with as many layers as fit. `shards`: the same with all 28 layers over several ranks, each with a sequence
of its own; the worst rank counts. Peaks are read at every moment of the step, so that a wrong part shows.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eagle_kernels import MemoryPlan, OffloadEngine, plan_memory
from eagle_model import EagleForConditionalGeneration, PackedBatch, preset
from eagle_model.memory import decoder_shape, vision_shape
from eagle_train.config import ParallelConfig, StageConfig
from eagle_train.distributed.sharding import shard_model
from eagle_train.distributed.world import start_world
from eagle_train.training.optim import make_optimizer, set_trainable

GIB = 1 << 30
TEXT = 2048
LIBRARIES = ("torch", "triton", "transformers", "flash-attn-4")


class Moments:
    """The allocator's peak between marks, and the overall one."""

    def __init__(self, model: Any) -> None:
        self.peaks: dict[str, int] = {}
        self.current: str | None = None
        self._watch(model)

    def mark(self, name: str | None) -> None:
        if self.current is not None:
            self.peaks[self.current] = max(self.peaks.get(self.current, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        self.current = name

    def _watch(self, model: Any) -> None:
        """Marks where the parts of the model begin, forward and backward."""
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


def log(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def worst(ms: float, peaks: dict[str, int]) -> tuple[float, dict[str, int]]:
    """The slowest rank's time, and of every moment the highest peak that a rank saw."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ms, peaks
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (ms, peaks))
    return max(time for time, _ in found), {moment: max(peak[moment] for _, peak in found) for moment in peaks}


def described(layers: int) -> Any:
    return preset("8b", image_token_index=151665, text_config={"num_hidden_layers": layers})


def batch(config: Any, tokens: int) -> PackedBatch:
    """One sequence: all image tokens but TEXT of text, and these are the labels."""
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


def step(model: Any, moments: Moments, inputs: PackedBatch, optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    """(milliseconds, loss) of one step; gradients are gone afterwards."""
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
    name: str,
    model: Any,
    moments: Moments,
    tokens: int,
    order: list[str],
    plans: dict[str, MemoryPlan],
    optimizer: torch.optim.Optimizer | None = None,
) -> list[dict[str, Any]]:
    """Steps in the order of policies asked for; one row per policy, its fastest step and the peaks of its last one."""
    config = model.config
    inputs = batch(config, tokens)
    begin = time.perf_counter()
    engine = OffloadEngine(plans["offload"].host + (1 << 20)) if "offload" in order else None
    log(f"{name}: engine of {plans['offload'].host / GIB:.1f} GiB in {time.perf_counter() - begin:.1f} s")
    times: dict[str, list[float]] = {policy: [] for policy in order}
    peaks: dict[str, dict[str, int]] = {}
    losses: dict[str, float] = {}
    for policy in order:
        model.set_activation_checkpointing({"recompute": "full", "offload": "offload"}[policy], engine if policy == "offload" else None)
        moments.peaks, moments.current = {}, None
        ms, losses[policy] = step(model, moments, inputs, optimizer)
        ms, peak = worst(ms, moments.peaks)
        times[policy].append(ms)
        peaks[policy] = peak
        log(f"{name} {policy}: {ms:.0f} ms, loss {losses[policy]:.4f}, peak {max(peak.values()) / GIB:.2f} GiB")
    rows = []
    for policy, plan in plans.items():
        if policy not in times:
            continue
        peak = max(peaks[policy].values())
        rows.append(
            {
                "case": name, "ranks": int(os.environ.get("WORLD_SIZE", "1")),
                "tokens": tokens, "layers": config.text_config.num_hidden_layers, "policy": policy, "ms": min(times[policy]),
                "all_ms": times[policy], "tokens_per_second": tokens / min(times[policy]) * 1e3, "loss": losses[policy],
                "over_recompute": min(times[policy]) / min(times["recompute"]) - 1 if "recompute" in times else None,
                "peak_gib": peak / GIB, "planned_gib": plan.gpu / GIB, "plan_error": plan.gpu / peak - 1, "planned_moment": plan.moment,
                "host_gib": plan.host / GIB, "peaks_gib": {key: value / GIB for key, value in peaks[policy].items()},
                "planned_moments_gib": {key: sum(parts.values()) / GIB for key, parts in plan.moments.items()},
            }
        )  # fmt: skip
    return rows


def make(layers: int, dtype: torch.dtype) -> Any:
    """Random weights; made on the GPU, where filling 8 billion takes a second."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return EagleForConditionalGeneration(described(layers)).train()
    finally:
        torch.set_default_dtype(before)


def plain(cases: list[tuple[str, int, list[str]]], layers: int) -> list[dict[str, Any]]:
    model = make(layers, torch.bfloat16)
    moments = Moments(model)
    rows = []
    for name, tokens, order in cases:
        vision = vision_shape(model.config, tokens - TEXT)
        shape = decoder_shape(model.config)
        plans = {
            policy: plan_memory(shape, tokens, vision=vision, labelled=TEXT, offload=policy == "offload")
            for policy in ("recompute", "offload")
        }
        rows += run(name, model, moments, tokens, order, plans)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def trained(name: str, tokens: int, layers: int, frozen: bool, order: list[str]) -> list[dict[str, Any]]:
    """FSDP2 as the trainer does it: float32 weights and states, computation in bf16."""
    parallel = ParallelConfig(dtype="bfloat16")
    world = start_world(parallel, "cuda")
    model = make(layers, torch.float32)
    config = model.config
    stage = StageConfig(name=name, max_tokens=tokens, train=["connector", "language"] if frozen else ["vision", "connector", "language"])
    set_trainable(model, stage.train)
    model = shard_model(model, world, parallel)
    optimizer = make_optimizer(model, stage)
    shape, vision = decoder_shape(config), vision_shape(config, tokens - TEXT)
    vision = dataclasses.replace(vision, frozen=frozen)
    widths: dict[str, Any] = {"weight_bytes": 4, "gradient_bytes": 4, "optimizer_bytes": 8, "compute_bytes": 2, "shards": world.size}
    plans = {
        policy: plan_memory(shape, tokens, vision=vision, labelled=TEXT, offload=policy == "offload", **widths)
        for policy in ("recompute", "offload")
    }
    rows = run(name, model, Moments(model), tokens, order, plans, optimizer)
    world.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", nargs="*", default=["32k", "128k", "optimizer", "frozen"])
    options = parser.parse_args()
    rows = []
    both = ["recompute", "offload"]
    # The first step of a length compiles and fills the allocator; the fastest of each policy counts.
    cases = [("32k", 32768, [*both, *both, *both]), ("128k", 131072, ["offload", *both, "recompute"])]
    cases = [case for case in cases if case[0] in options.only]
    if cases:
        rows += plain(cases, 28)
        write(rows, options.out)
    for name, layers, frozen in (("optimizer", 12, False), ("frozen", 16, True), ("shards", 28, False)):
        if name in options.only:
            gc.collect()
            torch.cuda.empty_cache()
            # AdamW's states appear in the first step, after its peak: the last step of each policy counts.
            rows += trained(name, 32768, layers, frozen, ["recompute", "offload", "recompute"])
            write(rows, options.out)
    for row in rows:
        ratio = f" ({row['over_recompute']:+.1%})" if row["over_recompute"] is not None else ""
        log(
            f"{row['case']}: {row['tokens']} tokens, {row['layers']} layers, {row['policy']}: {row['ms']:.0f} ms{ratio}, "
            f"{row['tokens_per_second']:.0f} tokens/s, peak {row['peak_gib']:.2f} GiB, planned {row['planned_gib']:.2f} "
            f"({row['plan_error']:+.1%}, {row['planned_moment']}), host {row['host_gib']:.2f} GiB, loss {row['loss']:.4f}"
        )


def write(rows: list[dict[str, Any]], path: Path | None) -> None:
    if path is not None and int(os.environ.get("RANK", "0")) == 0:
        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES if _installed(name)},
            "rows": rows,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
