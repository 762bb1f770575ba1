"""A training step of the 8B in which all ranks share one sequence: rate, MFU, memory against the plan, share of communication.

    python -m torch.distributed.run --standalone --nproc-per-node=8 packages/eagle-train/benchmarks/context_step.py --tokens 128K 1M

As `eagle train` does it with `model: {preset: 8b, weights: bfloat16}`, `optimizer: adamw8bit`, `activations: selective`: FSDP2 over all
ranks, one sequence of visual tokens and 2048 text tokens, which have the labels, forward, backward, clipping and the optimizer's step.
`--splits all` measures every split ulysses x all-gather; the default is the one that `plan_context` chooses. The fastest step of the
slowest rank counts, the largest peak of any rank, and the main rank's profile of one more step (`communication.py`). A rank that fails
(out of memory) ends the command with exit code 3 at once; results up to then are written. `--small`: a tiny model, gloo, 1/64 of the
tokens.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command does
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from communication import profiled

from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report, write
from benchmarks.rivals import Absent
from eagle_cp import Layout, plan_context
from eagle_model import EagleForConditionalGeneration, PackedBatch, preset
from eagle_model.flops import forward_flops
from eagle_model.language.spec import head_dim
from eagle_train.config import Config, parse_config
from eagle_train.distributed.sharding import shard_model
from eagle_train.distributed.world import World, start_world
from eagle_train.training.activations import make_engine
from eagle_train.training.memory import usage
from eagle_train.training.optim import make_optimizer, set_trainable
from eagle_train.training.selection import Selector, select
from eagle_train.training.speed import memory, peak_flops

GIB = 1 << 30
LIBRARIES = ("torch", "triton", "transformers", "flash-attn-4", "torchao")
METRICS = {
    "step_s": Metric("s", "lower"),
    "tokens_per_s": Metric("per GPU", "higher"),
    "mfu": Metric("", "higher"),
    "reserved_gib": Metric("GiB, largest", "lower"),
    "planned_gib": Metric("GiB", "none"),
    "plan_error": Metric("reserved / planned - 1", "none"),
    "comm_share": Metric("of the step", "lower"),
    "comm_exposed": Metric("of the step", "lower"),
    "idle_share": Metric("of the step", "lower"),
    "loss": Metric("", "none"),
}
FAILED = 3


@dataclass(frozen=True)
class Setting:
    """What is measured: the 8B on GPUs, or a tiny model on a CPU."""

    small: bool
    activations: str
    text: int
    described: Any

    @classmethod
    def of(cls, small: bool, activations: str) -> Setting:
        if small:
            heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 112, "head_dim": 4, "num_hidden_layers": 2}
            return cls(True, activations, 64, preset("tiny", image_token_index=300, text_config=heads))
        return cls(False, activations, 2048, preset("8b", image_token_index=151665))

    def config(self, tokens: int, ulysses: int, all_gather: int, *, auto: bool = False) -> Config:
        low = {} if self.small else {"weights": "bfloat16"}
        parallel = {"ulysses": ulysses, "all_gather": all_gather, "dtype": "float32" if self.small else "bfloat16"}
        stage = {"name": "one", "max_tokens": tokens, "packs_per_step": 1, "optimizer": "adamw" if self.small else "adamw8bit"}
        return parse_config(
            {
                "model": {"preset": "tiny" if self.small else "8b", "activations": self.activations} | low,
                "stages": [stage],
                "parallel": parallel | ({"context": "auto"} if auto else {}),
            }
        )

    def model(self, device: torch.device) -> Any:
        """Random weights, made on the device, where filling 8 billion values takes a second."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if self.small else torch.bfloat16)
        try:
            with device:
                return EagleForConditionalGeneration(self.described).train()
        finally:
            torch.set_default_dtype(before)


def layout_of(world: World, setting: Setting, tokens: int, ulysses: int) -> Layout:
    if world.size == 1:
        return Layout.single((0, tokens))
    text = setting.described.text_config
    return Layout.build((0, tokens), world.splits[ulysses], num_heads=text.num_attention_heads, num_kv_heads=text.num_key_value_heads)


def batch_of(world: World, setting: Setting, tokens: int, layout: Layout) -> PackedBatch:
    """This rank's part of one sequence, with the pixels of its tiles alone."""
    config = setting.described
    tiles = (tokens - setting.text) // config.tokens_per_tile
    images, vocabulary = tiles * config.tokens_per_tile, min(config.text_config.vocab_size, config.image_token_index)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    ids[:images] = config.image_token_index
    targets = torch.full((tokens,), -100)
    targets[-setting.text :] = torch.randint(0, vocabulary, (setting.text,), generator=generator)
    whole = PackedBatch(
        input_ids=ids,
        targets=targets,
        position_ids=torch.arange(tokens),
        token_weights=torch.ones(tokens),
        cu_seqlens=(0, tokens),
        tiles=torch.empty(0, config.tile_size, config.tile_size, 3, dtype=torch.uint8),
        visual_index=torch.arange(images),
        num_kept=setting.text,
        label_weight=float(setting.text),
        denominator=torch.tensor(float(setting.text)),
    )
    part = whole.shard(layout, config.tokens_per_tile)
    mine = tiles if part.tile_plan is None else part.tile_plan.last - part.tile_plan.first
    pixels = torch.randint(0, 256, (mine, config.tile_size, config.tile_size, 3), dtype=torch.uint8, generator=generator)
    return replace(part, tiles=pixels).to(world.device)


def step(model: Any, part: PackedBatch, layout: Layout, optimizer: torch.optim.Optimizer) -> float:
    """The loss of one step of the trainer, of this rank's tokens."""
    loss = model(part, layout=layout).loss
    loss.backward()
    nn.utils.clip_grad_norm_([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def step_flops(setting: Setting, tokens: int) -> float:
    """FLOPs of forward and backward of all ranks, without recomputation."""
    flops = forward_flops(setting.described)
    assert flops is not None
    tiles = (tokens - setting.text) // setting.described.tokens_per_tile
    pairs = tokens * (tokens + 1) / 2
    return 3 * (flops.token * tokens + flops.pair * pairs + flops.label * setting.text + (flops.tile + flops.connector) * tiles)


class Bench:
    """The model over the ranks, once for all sequences."""

    def __init__(self, setting: Setting, world: World, longest: int) -> None:
        self.setting, self.world = setting, world
        config = setting.config(longest, 1, world.size)
        stage = config.stages[0]
        #: Bytes that a plan may have on the fullest GPU, before the model is there.
        self.room = Selector(config, world, usage).room
        model = setting.model(world.device)
        set_trainable(model, stage.modes)
        self.model: Any = shard_model(model, world, config.parallel)
        self.optimizer = make_optimizer(self.model, stage)
        self.engine = make_engine(config, setting.described, world) if setting.activations == "offload" else None
        if world.device.type == "cuda":
            torch.cuda.empty_cache()

    def splits(self, tokens: int, which: str) -> list[int]:
        """Sizes of the Ulysses level to measure."""
        if self.world.size == 1:
            return [1]
        if which == "all":
            return sorted(self.world.splits)
        text = self.setting.described.text_config
        heads = {"num_heads": text.num_attention_heads, "num_kv_heads": text.num_key_value_heads}
        return [plan_context([tokens], self.world.size, head_dim=head_dim(text), **heads).ulysses]

    def warm_up(self, tokens: int) -> None:
        """Compile kernels and allocate the optimizer's states on a short sequence."""
        for ulysses in self.splits(tokens, "chosen"):
            layout = layout_of(self.world, self.setting, tokens, ulysses)
            self._keep(tokens, ulysses)
            step(self.model, batch_of(self.world, self.setting, tokens, layout), layout, self.optimizer)

    def _keep(self, tokens: int, ulysses: int) -> tuple[float, str]:
        """Set what backward finds of the activations; GiB of the plan, and the choice in words."""
        config = self.setting.config(tokens, ulysses, self.world.size // ulysses)
        mode = self.setting.activations
        if mode != "selective":
            self.model.set_activation_checkpointing(mode, self.engine)
            return 0.0, mode
        chosen = select(config, config.stages[0], self.setting.described, self.world.size, self.room)
        self.model.set_activation_checkpointing("selective", **chosen.options)
        return chosen.plan.gpu / GIB, chosen.text

    def measure(self, tokens: int, ulysses: int, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics and details of a case."""
        world, gpu = self.world, self.world.device.type == "cuda"
        layout = layout_of(world, self.setting, tokens, ulysses)
        planned, kept = self._keep(tokens, ulysses)
        part = batch_of(world, self.setting, tokens, layout)
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times, loss = [], 0.0
        for _ in range(rounds):
            world.barrier()
            begin = time.perf_counter()
            loss = step(self.model, part, layout, self.optimizer)
            if gpu:
                torch.cuda.synchronize()
            times.append(max(world.gather(time.perf_counter() - begin)))
        peak = max(world.gather(memory(world.device)[1])) / GIB
        seconds, flops = min(times), step_flops(self.setting, tokens) / world.size
        metrics = {"step_s": seconds, "tokens_per_s": tokens / world.size / seconds, "reserved_gib": peak}
        metrics["loss"] = sum(world.gather(loss))
        if planned and gpu:
            metrics |= {"planned_gib": planned, "plan_error": peak / planned - 1}
        if (rate := peak_flops(world.device, "bfloat16")) is not None:
            metrics["mfu"] = flops / seconds / rate
        details: dict[str, Any] = {"all_s": times, "kept": kept, "layout": repr(layout), "tflops": flops / seconds / 1e12}
        return metrics, details

    def profile(self, tokens: int, ulysses: int, details: dict[str, Any]) -> dict[str, float]:
        """Shares of one more step of the case that was measured last, on the main rank; kernels go to `details`."""
        layout = layout_of(self.world, self.setting, tokens, ulysses)
        part = batch_of(self.world, self.setting, tokens, layout)
        self.world.barrier()

        def once() -> None:
            step(self.model, part, layout, self.optimizer)
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()

        if not self.world.is_main:
            once()
            return {}
        found, details["kernels_ms"] = profiled(once, self.world.device)
        return {"comm_share": found.busy, "comm_exposed": found.exposed, "idle_share": found.idle}


def parse_tokens(text: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    return int(text.rstrip("KM")) * factor


def run(options: argparse.Namespace, world: World, setting: Setting, result: Result) -> None:
    lengths = [tokens // 64 if options.small else tokens for tokens in options.tokens]
    bench = Bench(setting, world, max(lengths))
    if world.is_main:
        room = "" if bench.room is None else f", plans of at most {bench.room / GIB:.1f} GiB"
        print(f"{world.size} ranks on {world.device.type}{room}", flush=True)
    bench.warm_up(max(min(lengths) // 8, setting.text * 2))
    for tokens, named in zip(lengths, options.tokens):
        for ulysses in bench.splits(tokens, options.splits):
            label = f"{named >> 10}K, {world.size} ranks"
            metrics, details = bench.measure(tokens, ulysses, options.rounds)
            name = f"ours, u={ulysses} r={world.size // ulysses}, {setting.activations}"
            case = result.add(label, name, details=details, **metrics)
            for profile in (False, True) if options.profile else (False,):
                if profile:  # what was measured is written by then
                    case.metrics.update(bench.profile(tokens, ulysses, details))
                if world.is_main:
                    print(label, name, {key: round(value, 4) for key, value in case.metrics.items()}, details["kept"], flush=True)
                    if options.out is not None:
                        write(result, options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=parse_tokens, default=[131072], metavar="N", help="lengths of the sequence: 128K, 1M")
    parser.add_argument("--splits", choices=("chosen", "all"), default="chosen")
    parser.add_argument("--activations", choices=("selective", "recompute", "offload"), default="selective")
    parser.add_argument("--rounds", type=int, default=2, help="steps of every case")
    parser.add_argument("--profile", action="store_true", help="one more step each, for the share of communication")
    parser.add_argument("--small", action="store_true")
    add_out(parser)
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --small runs on a CPU")
    ranks, setting = int(os.environ.get("WORLD_SIZE", "1")), Setting.of(options.small, options.activations)
    first = setting.config(options.tokens[0], 1, ranks, auto=ranks > 1)
    if options.small:
        torch.set_num_threads(1)
    world = start_world(first.parallel, "cpu" if options.small else "cuda")
    settings = {"tokens": options.tokens, "ranks": ranks, "splits": options.splits, "activations": options.activations}
    result = Result("eagle-train/context_step", environment(LIBRARIES, gpus=0 if options.small else ranks), METRICS, settings=settings)
    try:
        run(options, world, setting, result)
    except Exception as error:
        # The others may wait for this rank in a collective: they are ended by the launcher.
        traceback.print_exc()
        print(f"rank {world.rank}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if options.out is not None:
            cut = [(case.case, case.contender) for case in result.cases]
            result.absent.append(Absent("after " + (cut[-1][0] if cut else "the start"), "ours", f"{type(error).__name__}: {error}"[:300]))
            write(result, options.out.with_suffix(f".rank{world.rank}.json") if world.rank else options.out)
        sys.stdout.flush()
        os._exit(FAILED)
    if world.is_main:
        report(result, options.out)
    world.close()


if __name__ == "__main__":
    main()
