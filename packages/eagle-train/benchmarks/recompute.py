"""CPU time that activation checkpointing itself costs in a decoder layer: how long Python and autograd keep a GPU waiting at most.

    OMP_NUM_THREADS=1 python packages/eagle-train/benchmarks/recompute.py [--layers 12] [--rounds 15] [--out FILE.json]

A decoder of width 48 on 40 tokens, forward and backward on one core, where launching operations costs more than what they compute.
Contenders in turn: everything kept; `torch.utils.checkpoint` (non-reentrant); the same with a policy of
`create_selective_checkpoint_contexts` that keeps matrix products and attention; and `selective` at each level.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_kernels import Kept
from eagle_model import EagleForConditionalGeneration, PackedBatch, preset
from eagle_model.activation_checkpointing import run_through

SIZES = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LENGTHS = (16, 24)
METRICS = {name: Metric("us per layer", "lower") for name in ("forward", "backward", "both")}
SAVED = {"aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu"}


def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator._schema.name in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def contenders(model: Any, layers: int) -> dict[str, Callable[[], None]]:
    whole = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    by_operator = partial(whole, context_fn=partial(create_selective_checkpoint_contexts, policy))
    levels = {"attention": Kept(layers), "projections": Kept(layers, layers), "all": Kept.all(layers)}

    def torch_checkpoint(function: Callable[..., Any]) -> None:
        model.set_activation_checkpointing("keep")
        run_through(model, function, function)

    return {
        "kept": lambda: model.set_activation_checkpointing("keep"),
        "torch.utils.checkpoint": lambda: torch_checkpoint(whole),
        "torch selective policy": lambda: torch_checkpoint(by_operator),
        "ours, recompute": lambda: model.set_activation_checkpointing("recompute"),
    } | {f"ours, selective: {name}": partial(model.set_activation_checkpointing, "selective", kept=kept) for name, kept in levels.items()}


def batch() -> PackedBatch:
    ids = torch.randint(0, 100, (sum(LENGTHS),))
    return PackedBatch(
        input_ids=ids,
        targets=ids,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
        token_weights=torch.ones(len(ids)),
        cu_seqlens=(0, *accumulate(LENGTHS)),
        tiles=None,
        visual_index=None,
        num_kept=len(ids),
        label_weight=float(len(ids)),
        denominator=torch.tensor(float(len(ids))),
    )


def step(model: Any, inputs: PackedBatch, layers: int) -> tuple[float, float]:
    begin = time.process_time()
    loss = model(inputs).loss
    middle = time.process_time()
    loss.backward()
    end = time.process_time()
    model.zero_grad()
    return (middle - begin) * 1e6 / layers, (end - middle) * 1e6 / layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = preset("tiny", text_config=SIZES | {"num_hidden_layers": options.layers}, image_token_index=101)
    model = EagleForConditionalGeneration(config).train()
    inputs = batch()
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name, choose in contenders(model, options.layers).items():
            choose()
            step(model, inputs, options.layers)
            found.setdefault(name, []).append(step(model, inputs, options.layers))
    settings = {"layers": options.layers, "rounds": options.rounds, "tokens": sum(LENGTHS)}
    result = Result("eagle-train/recompute", environment(("torch",)), METRICS, settings=settings)
    for name, times in found.items():
        forward, backward = (statistics.median(column) for column in zip(*times))
        both = statistics.median(sum(pair) for pair in times)
        result.add("decoder layer", contender=name, forward=forward, backward=backward, both=both)
    report(result, options.out)


if __name__ == "__main__":
    main()
