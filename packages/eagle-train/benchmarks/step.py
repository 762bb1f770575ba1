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
row alone. `--rival`: the same steps by transformers, Liger and flash-attn-4 too (`training_step/rival.py`), or by those that it names
(NeMo AutoModel: `training_step/nemo.py`); `questions` compares with the former's step of one row. `--small`: `questions` at tiny sizes on
the CPU, to see that it runs; its times say nothing.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command does
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from training_step.measured import METRICS, release
from training_step.nemo import NEMO
from training_step.policies import POLICIES, measure
from training_step.questions import shared_media
from training_step.rival import LIGER, compare
from training_step.sharded import trained

from benchmarks.cuda import ceilings
from benchmarks.environment import environment
from benchmarks.results import Result, add_out, report, write

LAYERS = 28
WHOLE = {"32k": 32768, "64k": 65536, "128k": 131072}
SHARDED = {"optimizer": (12, False), "frozen": (16, True), "shards": (LAYERS, False)}
"""Layers, and whether the vision tower is frozen, by case."""
QUESTIONS = "questions"
DEFAULT = "liger"
RIVALS = {DEFAULT: LIGER} | NEMO
RECIPES = ["rowwise", "rowwise_with_gw_hp"]
LIBRARIES = ("torch", "triton", "transformers", "flash-attn-4", "liger-kernel", "nemo-automodel")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*WHOLE, "optimizer", "frozen"], metavar="CASE")
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES, help="of 32k, 64k and 128k")
    parser.add_argument("--rounds", type=int, default=2, help="steps of every policy, and of every contender of questions")
    parser.add_argument("--rival", nargs="*", choices=RIVALS, help=f"also 32k, 64k and 128k by public packages ({DEFAULT} by default)")
    recipes = f"of 32k, 64k and 128k, also with 8-bit floats: {', '.join(RECIPES)} (both)"
    parser.add_argument("--fp8", nargs="*", choices=RECIPES, metavar="RECIPE", help=recipes)
    parser.add_argument("--profile", action="store_true", help="of 32k, 64k and 128k: one more step each, with the time of every kernel")
    parser.add_argument("--small", action="store_true", help="only questions, at tiny sizes on the CPU")
    add_out(parser)
    options = parser.parse_args()
    if unknown := set(options.only) - {*WHOLE, *SHARDED, QUESTIONS}:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}")
    if options.small and options.only != [QUESTIONS]:
        parser.error(f"--small is for --only {QUESTIONS}; the other cases measure a GPU")
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    return options


def main() -> None:
    options = parse()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    main_rank = int(os.environ.get("RANK", "0")) == 0
    gpus = 0 if options.small else ranks
    settings = {"only": options.only, "ranks": ranks, "small": options.small}
    result = Result("eagle-train/step", environment(LIBRARIES, gpus=gpus), METRICS, settings=settings)
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if gpus == 1:
        result.ceilings = ceilings()
        release()
    # The first step of a length compiles and fills the allocator; the fastest of each policy counts.
    cases = [(name, tokens, options.policies * options.rounds) for name, tokens in WHOLE.items() if name in options.only]
    if cases:
        recipes = [] if options.fp8 is None else options.fp8 or RECIPES
        measure(result, cases, LAYERS, options.out, recipes, options.profile)
        names = [] if options.rival is None or ranks > 1 else options.rival or [DEFAULT]
        for name in names:
            compare(result, RIVALS[name], [(name, tokens) for name, tokens, _ in cases], options.rounds, LAYERS, options.out)
        release()
    if QUESTIONS in options.only:
        tokens = 64 if options.small else 131072
        shared_media(result, tokens, options.rounds, options.out, small=options.small, with_rival=options.rival is not None)
    for name in (name for name in SHARDED if name in options.only):
        if main_rank and options.out is not None:
            write(result, options.out)  # the cases so far, in case the next one runs out of memory
        release()
        # AdamW's states are allocated in the first step, after its peak: the last step of each policy counts.
        trained(result, name, 32768, *SHARDED[name], ["recompute", "offload", "recompute"])
    if main_rank:
        report(result, options.out)


if __name__ == "__main__":
    main()
