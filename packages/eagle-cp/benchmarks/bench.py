"""Measures eagle-cp and its rivals on the 2, 4 or 8 GPUs of this host.

    python -m torch.distributed.run --standalone --nproc-per-node=2 packages/eagle-cp/benchmarks/bench.py --out results.json

TFLOP/s per GPU = (4 forward, 10 backward) x attended pairs x query heads x head dim / GPUs / time; the slowest rank's median of
CUDA-event times."""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import re
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
sys.path.insert(0, str(Path(__file__).parent))

import flash_attn_2_from_torch
import packs
import torch
import torch.distributed as dist
from rivals import RIVALS, Unavailable

from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report, write
from benchmarks.rivals import Absent, load
from eagle_cp import ContextMesh, Layout, attention
from eagle_cp.backends import KERNELS

LIBRARIES = ("torch", "flash-attn-4", "nvidia-cutlass-dsl", "yunchang", "ring-flash-attn", "transformers", "triton")
METRICS = {
    "forward_ms": Metric("ms", "lower"),
    "both_ms": Metric("ms", "lower"),
    "forward_tflops": Metric("per GPU", "higher"),
    "backward_tflops": Metric("per GPU", "higher"),
    "both_tflops": Metric("per GPU", "higher"),
    "peak_gib": Metric("GiB", "lower"),
    "needed_gib": Metric("GiB", "none"),
    "peak_over_needed": Metric("", "lower"),
}
HEADS, KV_HEADS, DIM = 28, 4, 128


def log(*args):
    if dist.get_rank() == 0:
        print(*args, flush=True)


def slowest(value: float) -> float:
    x = torch.tensor([value], device="cuda", dtype=torch.float64)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.item()


def time_ms(function, seconds: float) -> float:
    """Median time in ms. Each repetition is timed with CUDA events after a barrier; 2 to 20 repetitions, as many as fit `seconds`, after
    one warm-up."""

    def once():
        dist.barrier()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    first = slowest(once())
    repetitions = int(max(2, min(20, seconds * 1e3 / max(first, 0.01))))
    return slowest(statistics.median(once() for _ in range(repetitions)))


def measure(step, inputs, pairs: int, world: int, seconds: float) -> dict:
    out = step(*inputs)
    dout = torch.randn_like(out)
    del out

    def forward():
        with torch.no_grad():
            step(*inputs)

    def both():
        torch.autograd.grad(step(*inputs), inputs, dout)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = int(slowest(torch.cuda.max_memory_allocated()))
    # At the end of the backward these exist: inputs, their gradients, the output and its gradient.
    needed = 2 * sum(x.numel() * x.element_size() for x in inputs) + 2 * dout.numel() * dout.element_size()
    forward_ms, both_ms = time_ms(forward, seconds / 3), time_ms(both, seconds)
    flops = 4 * pairs * HEADS * DIM / world
    return {
        "forward_ms": forward_ms,
        "both_ms": both_ms,
        "forward_tflops": flops / forward_ms / 1e9,
        "backward_tflops": 2.5 * flops / max(both_ms - forward_ms, 1e-3) / 1e9,
        "both_tflops": 3.5 * flops / both_ms / 1e9,
        "peak_gib": peak / 2**30,
        "needed_gib": needed / 2**30,
        "peak_over_needed": peak / needed,
    }


def ours(lengths, mesh: ContextMesh | None, backend: str, prefixes=None):
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    if mesh is None:
        layout = Layout.single(cu, prefixes)
    else:
        layout = Layout.build(cu, mesh, prefixes=prefixes, num_heads=HEADS, num_kv_heads=KV_HEADS)
    inputs = [torch.randn(layout.local, h, DIM, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS)]
    return (lambda q, k, v: attention(q, k, v, layout, backend=backend)), inputs


def dense_mask(trees: packs.Trees):
    """Trees by one attention over the pack with a mask of T x T values, on one GPU: torch's memory-efficient kernel."""
    total = sum(trees.lengths)
    document = torch.arange(len(trees.lengths), device="cuda").repeat_interleave(torch.tensor(trees.lengths, device="cuda"))
    continued = torch.tensor(trees.prefixes, device="cuda")[document]
    place = torch.arange(total, device="cuda")
    mask = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    mask |= continued[:, None] == document[None]
    inputs = [torch.randn(1, h, total, DIM, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS)]

    def step(q, k, v):
        # The kernel knows no groups of query heads.
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return step, inputs


def measure_trees(args, result: Result, meshes: dict, world: int) -> None:
    """Packs of trees next to the same rows as documents of their own, and next to a dense mask where it fits one GPU."""
    ways = {f"u={u} r={world // u}": mesh for u, mesh in meshes.items()} if world > 1 else {}
    for (name, make_trees), backend in itertools.product(packs.TREES.items(), ("flash-attn-4", "cudnn", "torch-flash")):
        trees = make_trees()
        rows = trees.separate()
        for way, mesh in {"one GPU": None, **ways}.items():
            ranks = 1 if mesh is None else world
            contenders = {
                f"trees, {way}, {backend}": (partial(ours, trees.lengths, mesh, backend, trees.prefixes), trees.pairs()),
                f"separate rows, {way}, {backend}": (partial(ours, rows, mesh, backend), packs.causal_pairs(rows)),
            }
            if mesh is None and backend == "torch-flash":
                contenders["dense mask, one GPU, torch"] = (partial(dense_mask, trees), trees.pairs())
            for contender, (make, pairs) in contenders.items():
                if not re.search(args.packs, name) or not re.search(args.methods, contender):
                    continue
                found = attempt(lambda _, make=make: make(), None, ranks, args.seconds, pairs)
                log(name, "|", contender, "|", found)
                if isinstance(found, str):
                    result.absent.append(Absent(name, contender, found))
                else:
                    result.add(name, contender, **found)
                if dist.get_rank() == 0 and args.out is not None:
                    write(result, args.out)  # a later pack may run out of time


def ceilings(world: int) -> dict:
    """Measured ceilings of this machine: copies, matrix products, and NCCL between the ranks (GB/s that leave a GPU)."""
    n = 1 << 28
    a, b = torch.randn(n, device="cuda", dtype=torch.bfloat16), torch.empty(n, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gathered = torch.empty(world * n // 4, device="cuda", dtype=torch.bfloat16)
    part = torch.randn(n // 4, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(world * n // 8, device="cuda")
    mine = torch.empty(n // 8, device="cuda")
    copy_ms = time_ms(lambda: b.copy_(a), 0.2)
    result = {"copy_gb_s": 2 * a.nbytes / copy_ms / 1e6, "matmul_tflops": 2 * 8192**3 / time_ms(lambda: x @ x, 0.3) / 1e9}
    if world > 1:
        result["all_gather_gb_s"] = part.nbytes * (world - 1) / time_ms(lambda: dist.all_gather_into_tensor(gathered, part), 0.2) / 1e6
        result["all_to_all_gb_s"] = a.nbytes * (world - 1) / world / time_ms(lambda: dist.all_to_all_single(b, a), 0.2) / 1e6
        result["reduce_scatter_gb_s"] = mine.nbytes * (world - 1) / time_ms(lambda: dist.reduce_scatter_tensor(mine, wide), 0.2) / 1e6
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    parser.add_argument("--packs", default=".", help="regular expression over the names of packs")
    parser.add_argument("--methods", default=".", help="regular expression over the names of methods")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the repetitions of one measurement")
    parser.add_argument("--ctas", type=int, help="multiprocessors of a collective of eagle-cp (default: NCCL's choice)")
    parser.add_argument("--trees", action="store_true", help="packs of trees, next to the same rows as documents of their own")
    parser.add_argument("--until", type=float, default=1e9, help="seconds after which no measurement is started")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        parser.error("start it with torch.distributed.run on a machine with GPUs")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=60), device_id=torch.device("cuda", torch.cuda.current_device()))
    world, began = dist.get_world_size(), time.time()
    context = None
    if args.ctas:
        options = dist.ProcessGroupNCCL.Options()
        options.config.min_ctas = options.config.max_ctas = args.ctas
        context = dist.new_group(list(range(world)), pg_options=options)
    meshes = {u: ContextMesh.from_group(context, ulysses=u) for u in range(1, world + 1) if world % u == 0}
    settings = {name: value for name, value in vars(args).items() if name != "out"} | {"heads": [HEADS, KV_HEADS, DIM]}
    settings |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    result = Result("eagle-cp/bench", environment(LIBRARIES, gpus=world), METRICS, ceilings=ceilings(world), settings=settings)
    log(result.environment, result.ceilings)
    try:
        flash_attn_2_from_torch.install()
    except ImportError:
        log("no package flash_attn: rivals that need flash-attn 2 are reported as absent")
    loaded, result.absent = load("all packs", RIVALS)
    methods = {}
    for backend in ("flash-attn-4", "cudnn", "torch-flash"):
        for u, mesh in meshes.items():
            methods[f"ours u={u} r={world // u}, {backend}"] = lambda lengths, mesh=mesh, b=backend: ours(lengths, mesh, b)
        methods[f"one GPU, {backend}"] = lambda lengths, b=backend: ours(lengths, None, b)
    for name, make in loaded.items():
        methods[name] = lambda lengths, make=make: make(lengths, HEADS, KV_HEADS, DIM)
    if args.trees:
        measure_trees(args, result, meshes, world)
        methods = {}
    # flash-attn-4 first, then cuDNN, rivals, FlashAttention-2: with --until, the last ones may not be measured.
    turn = lambda m: 0 if "flash-attn-4" in m else 1 if "cudnn" in m else 2 if m in loaded else 3
    for _, tier in itertools.groupby(sorted(methods, key=turn), key=turn):
        for (pack, make_lengths), method in itertools.product(packs.PACKS.items(), list(tier)):
            lengths, make = make_lengths(), methods[method]
            if not re.search(args.packs, pack) or not re.search(args.methods, method):
                continue
            alone = method.startswith("one GPU")
            if alone and sum(lengths) > 131072 + 200 * 512:
                continue
            if sum(lengths) > 240000 and not re.search("flash-attn-4|cudnn|USP Ulysses", method):
                continue  # the slow ones take half a minute each, and scale as at 128K
            if slowest(time.time() - began) > args.until:
                found = "not measured: --until has passed"
            else:
                found = attempt(make, lengths, 1 if alone else world, args.seconds)
            log(pack, "|", method, "|", found)
            if isinstance(found, str):
                result.absent.append(Absent(pack, method, found))
            else:
                result.add(pack, method, **found)
            if dist.get_rank() == 0 and args.out is not None:
                write(result, args.out)
    if dist.get_rank() == 0:
        report(result, args.out)
    dist.destroy_process_group()


def attempt(make, lengths, world, seconds, pairs: int | None = None) -> dict | str:
    """The metrics of a method, or why there are none. pairs: attended pairs; default: those of causal documents of `lengths`."""
    step = None
    try:
        step, inputs = make(lengths)
        return measure(step, inputs, packs.causal_pairs(lengths) if pairs is None else pairs, world, seconds)
    except Unavailable as error:
        return f"does not run: {error}"
    except Exception as error:  # the failure of a rival is a result
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        if hasattr(step, "close"):
            step.close()
        step = inputs = None
        torch.cuda.empty_cache()


if __name__ == "__main__":
    assert KERNELS
    main()
