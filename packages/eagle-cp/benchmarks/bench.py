"""Measures eagle-cp and its rivals on the GPUs of this host: one causal document and three packs, every split of the ranks.

    python -m torch.distributed.run --standalone --nproc-per-node=2 packages/eagle-cp/benchmarks/bench.py --out results.json
    python -m torch.distributed.run --standalone --nproc-per-node=8 packages/eagle-cp/benchmarks/bench.py --small --tokens 64K 1M

TFLOP/s per GPU = (4 forward, 10 backward) x attended pairs x query heads x head dim / GPUs / time; the slowest rank's median of CUDA-event
times. Splits with flash-attn-4 stand next to what `plan_context` predicts, and what misses its two aims is listed at the end
(`predicted.py`). `--small`: a CPU and gloo, packs of 1/1024 of the tokens, heads of 32, float32; its times only show that everything runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
sys.path.insert(0, str(Path(__file__).parent))

import flash_attn_2_from_torch
import measure
import packs
import predicted
import torch
import torch.distributed as dist
from measure import Shape, Unavailable, attempt, ceilings, log, slowest
from rivals import rivals
from tree_packs import measure_trees

from benchmarks.environment import environment
from benchmarks.results import Result, add_out, report, write
from benchmarks.rivals import Absent, load
from eagle_cp import ContextMesh, Layout, attention

LIBRARIES = ("torch", "flash-attn-4", "nvidia-cutlass-dsl", "yunchang", "ring-flash-attn", "transformers", "triton")
SMALL = 1024
Method = Callable[[list[int]], tuple[Any, list[torch.Tensor]]]


def ours(lengths: list[int], mesh: ContextMesh | None, backend: str, shape: Shape, prefixes: list[int] | None = None, whole: bool = False):
    cu = [0, *itertools.accumulate(lengths)]
    if mesh is None:
        layout = Layout.single(cu, prefixes)
    else:
        layout = Layout.build(cu, mesh, prefixes=prefixes, num_heads=shape.heads, num_kv_heads=shape.kv_heads, whole=whole)
    return (lambda q, k, v: attention(q, k, v, layout, backend=backend)), shape.inputs(layout.local)


def uncut(lengths: list[int], mesh: ContextMesh, backend: str, shape: Shape):
    """The split that cuts no document, where the planner would use it."""
    world = mesh.size
    if f"ours whole r={world}" not in predicted.candidates(lengths, world, *shape[:3]):
        raise Unavailable("whole documents leave one rank more than 1.05 times an equal share")
    return ours(lengths, mesh, backend, shape, whole=True)


def contenders(world: int, shape: Shape) -> tuple[dict[str, Method], dict[str, Method], dict[int, ContextMesh], list[Absent]]:
    """Ours and the rivals by name, the meshes by their Ulysses size, and what can't be imported."""
    meshes = {u: ContextMesh.from_group(ulysses=u) for u in range(1, world + 1) if world % u == 0}
    own: dict[str, Method] = {}
    for backend in ("flash-attn-4", "cudnn", "torch-flash") if shape.device == "cuda" else ("cpu",):
        for u, mesh in meshes.items():
            own[f"ours u={u} r={world // u}, {backend}"] = partial(ours, mesh=mesh, backend=backend, shape=shape)
        if world > 1:
            own[f"ours whole r={world}, {backend}"] = partial(uncut, mesh=meshes[1], backend=backend, shape=shape)
        own[f"one GPU, {backend}"] = partial(ours, mesh=None, backend=backend, shape=shape)
    loaded, absent = load("all packs", rivals(world, shape))
    return own, {name: partial(make, shape=shape) for name, make in loaded.items()}, meshes, absent


def main() -> None:
    args = arguments()
    device = "cpu" if args.small else "cuda"
    world, began = measure.start(device), time.time()
    shape = Shape(dim=32, dtype=torch.float32, device=device) if args.small else Shape()
    settings = {name: value for name, value in vars(args).items() if name != "out"} | {"heads": list(shape[:3])}
    if device == "cuda":
        settings |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    metrics = measure.METRICS | predicted.METRICS
    result = Result("eagle-cp/bench", environment(LIBRARIES, gpus=world if device == "cuda" else 0), metrics, settings=settings)
    result.ceilings = ceilings(world) if device == "cuda" else {}
    log(result.environment, result.ceilings)
    try:
        flash_attn_2_from_torch.install()
    except ImportError:
        log("no package flash_attn: rivals that need flash-attn 2 are reported as absent")
    own, others, meshes, result.absent = contenders(world, shape)
    if args.trees:
        measure_trees(args, result, meshes, world, ours, shape)
    else:
        tokens = [packs.parse(text) for text in args.tokens]
        sizes = {name: make(SMALL if args.small else 1) for name, make in packs.packs(tokens).items() if re.search(args.packs, name)}
        run(args, result, own | others, set(others), sizes, world, shape, began)
        missed = predicted.judge(result, list(sizes))
        if dist.get_rank() == 0:
            judged = [case for case in result.cases if case.contender == predicted.CHOICE]
            print(
                f"plan_context: {len(missed)} misses on {len(judged)} packs (15 % of a time, 3 % of the fastest split)", *missed, sep="\n  "
            )
    if dist.get_rank() == 0:
        report(result, args.out)
    dist.destroy_process_group()


def run(
    args: argparse.Namespace,
    result: Result,
    methods: dict[str, Method],
    others: set[str],
    sizes: dict[str, list[int]],
    world: int,
    shape: Shape,
    began: float,
) -> None:
    """Every method on every pack. flash-attn-4 first, then cuDNN, rivals, FlashAttention-2: with --until, the last ones may be left out."""
    turn = lambda m: 0 if "flash-attn-4" in m else 1 if "cudnn" in m else 2 if m in others else 3
    for _, tier in itertools.groupby(sorted(methods, key=turn), key=turn):
        for (pack, lengths), method in itertools.product(sizes.items(), list(tier)):
            if not re.search(args.methods, method):
                continue
            alone, tokens = method.startswith("one GPU"), sum(lengths)
            if alone and tokens > 131072 + 200 * 512:
                continue
            if tokens > 240000 and not re.search(r"flash-attn-4|cudnn|USP u=\d+ r=1 ", method):
                continue  # the slow ones take half a minute each, and scale as at 128K
            if slowest(time.time() - began, shape.device) > args.until:
                found = "not measured: --until has passed"
            else:
                found = attempt(partial(methods[method], lengths), packs.causal_pairs(lengths), 1 if alone else world, args.seconds, shape)
            log(pack, "|", method, "|", found)
            if isinstance(found, str):
                result.absent.append(Absent(pack, method, found))
            else:
                estimates = predicted.candidates(lengths, world, *shape[:3]) if predicted.SPLIT.fullmatch(method) else {}
                estimate = estimates.get(method.partition(",")[0])
                result.add(pack, method, **found, **(predicted.planned(estimate, found["both_ms"]) if estimate is not None else {}))
            if dist.get_rank() == 0 and args.out is not None:
                write(result, args.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    parser.add_argument("--tokens", nargs="+", default=["64K", "128K", "256K"], metavar="N", help="sizes of packs (64K, 1M or a number)")
    parser.add_argument("--packs", default=".", help="regular expression over the names of packs")
    parser.add_argument("--methods", default=".", help="regular expression over the names of methods")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the repetitions of one measurement")
    parser.add_argument("--trees", action="store_true", help="packs of trees, next to the same rows as documents of their own")
    parser.add_argument("--until", type=float, default=1e9, help="seconds after which no measurement is started")
    parser.add_argument("--small", action="store_true", help="on a CPU")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ or not (args.small or torch.cuda.is_available()):
        parser.error("start it with torch.distributed.run on a machine with GPUs, or with --small")
    try:
        packs.packs([packs.parse(text) for text in args.tokens])
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    main()
