"""Correctness on GPUs against float64: every kernel on segments, and every split `u` (ulysses) x `r` (all_gather) of the ranks.

    python -m torch.distributed.run --standalone --nproc-per-node=2 packages/eagle-cp/benchmarks/check.py --out check.json
    python -m torch.distributed.run --standalone --nproc-per-node=8 packages/eagle-cp/benchmarks/check.py --small

Errors are ||x - ref|| / ||ref||. A ratio is the error of a split over that of the same kernel on one GPU with the whole pack. Exits with 1
if a check cannot be computed or tiles are not exact. `--small`: a CPU and gloo, packs of 1/16 of the tokens, heads of 16, float32.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
sys.path.insert(0, str(Path(__file__).parent))
from measure import Shape, log, start

from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.rivals import Absent
from eagle_cp import ContextMesh, Layout, attention, exchange_tiles, plan_tiles
from eagle_cp.backends import KERNELS
from eagle_cp.segments import Segments

TENSORS = ("out", "dq", "dk", "dv")
METRICS = {name: Metric("error", "lower") for name in TENSORS} | {f"{name}_ratio": Metric("", "lower") for name in TENSORS}
METRICS["tiles_exact"] = Metric("1: yes", "higher")


def reference(q, k, v, cu_q, cu_k, causal):
    """Attention in float64, one segment and one query head at a time; queries are the last of their keys."""
    group, out = q.shape[1] // k.shape[1], []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        heads = []
        for h in range(q.shape[1]):
            s = q[a:b, h] @ k[c:d, h // group].T * q.shape[2] ** -0.5
            if causal:
                s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1 + (d - c) - (b - a)), -torch.inf)
            heads.append(s.softmax(-1) @ v[c:d, h // group])
        out.append(torch.stack(heads, 1))
    return torch.cat(out)


def error(x, ref):
    return float((x.double() - ref).norm() / ref.norm())


def exact(q, k, v, dout, cu_q, cu_k, causal):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = reference(q, k, v, cu_q, cu_k, causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def check_kernel(shape, kernel, causal, strided):
    """Fewer queries than keys, grouped queries, and (`strided`) tensors and outputs that are slices of wider ones."""
    draw = random.Random(3)
    lengths_k = [1, 5, 130, 700, 2048, 1999, 64]
    lengths_q = [1, 3, 130, draw.randint(1, 700), 1024, 1500, 64]
    cu = lambda n: [0, *torch.tensor(n).cumsum(0).tolist()]
    segments = Segments(cu(lengths_q), cu(lengths_k))
    wide = 2 if strided else 1
    make = lambda t, h: torch.randn(t, h * wide, shape.dim, device=shape.device, dtype=shape.dtype)[:, (wide - 1) * h :]
    q, dout = make(segments.total_q, 14), make(segments.total_q, 14)
    k, v = make(segments.total_k, 2), make(segments.total_k, 2)
    nan = float("nan")
    out, dq, dk, dv = (torch.full_like(make(x.shape[0], x.shape[1]), nan) for x in (q, q, k, v))
    if strided:
        out, dq, dk, dv = (
            torch.full((x.shape[0], x.shape[1] * 2, shape.dim), nan, device=shape.device, dtype=x.dtype)[:, x.shape[1] :]
            for x in (q, q, k, v)
        )
    scale = shape.dim**-0.5
    lse = kernel.forward(q, k, v, segments, causal, scale, out=out)
    kernel.backward(dout, q, k, v, out, lse, segments, causal, scale, dq, dk, dv)
    refs = exact(q, k, v, dout, segments.cu_q, segments.cu_k, causal)
    return {n: error(x, r) for n, x, r in zip(TENSORS, (out, dq, dk, dv), refs)}, {}


def check_split(shape, mesh, backend, lengths, heads, causal):
    torch.manual_seed(1)
    total, cu = sum(lengths), [0, *torch.tensor(lengths).cumsum(0).tolist()]
    make = lambda h: torch.randn(total, h, shape.dim, device=shape.device, dtype=shape.dtype)
    q, k, v, dout = (make(h) for h in (heads[0], heads[1], heads[1], heads[0]))
    refs = exact(q, k, v, dout, cu, cu, causal)

    def run(layout):
        local = [layout.shard(x).detach().requires_grad_() for x in (q, k, v)]
        out = attention(*local, layout, causal=causal, backend=backend)
        grads = torch.autograd.grad(out, local, layout.shard(dout))
        return [layout.unshard(x.detach()) for x in (out, *grads)]

    layout = Layout.build(cu, mesh, num_heads=heads[0], num_kv_heads=heads[1], verify=True)
    split = [error(x, r) for x, r in zip(run(layout), refs)]
    alone = [error(x, r) for x, r in zip(run(Layout.single(cu)), refs)]
    ratios = {f"{name}_ratio": a / b for name, a, b in zip(TENSORS, split, alone)}
    return dict(zip(TENSORS, split)) | ratios, {"layout": repr(layout)}


def check_tiles(shape, mesh):
    """Features are sent to the rows of their tokens, gradients to the tiles. Exact, because nothing is computed."""
    lengths = [4000, 13, 1500, 700]
    total = sum(lengths)
    layout = Layout.build([0, *torch.tensor(lengths).cumsum(0).tolist()], mesh, num_heads=28, num_kv_heads=4)
    mask = torch.zeros(total, dtype=torch.bool)
    mask[100 : 100 + 256 * 9] = mask[4100 : 4100 + 256 * 3] = True
    torch.manual_seed(7)
    features, grads = (torch.randn(12 * 256, 64, device=shape.device, dtype=shape.dtype) for _ in "fg")
    plan = plan_tiles(layout, mask, 256)
    mine = features[plan.first * 256 : plan.last * 256].clone().requires_grad_()
    rows = exchange_tiles(mine, layout, plan)
    order = mask.cumsum(0)[layout.local_tokens()[plan.local_rows]] - 1  # the feature of each local row
    (grad,) = torch.autograd.grad(rows, mine, grads[order.to(shape.device)])
    same = bool((rows == features[order.to(shape.device)]).all()) and bool((grad == grads[plan.first * 256 : plan.last * 256]).all())
    return {"tiles_exact": float(same)}, {"tiles": [plan.first, plan.last], "rows": len(plan.local_rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    parser.add_argument("--match", default=".", help="regular expression over the names of checks")
    parser.add_argument("--small", action="store_true", help="on a CPU")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ or not (args.small or torch.cuda.is_available()):
        parser.error("start it with torch.distributed.run on a machine with GPUs, or with --small")
    shape = Shape(dim=16, dtype=torch.float32, device="cpu") if args.small else Shape()
    world, by = start(shape.device), 16 if args.small else 1
    meshes = {u: ContextMesh.from_group(ulysses=u) for u in range(1, world + 1) if world % u == 0}
    libraries = ("torch", "flash-attn-4", "nvidia-cutlass-dsl", "triton")
    result = Result("eagle-cp/check", environment(libraries, gpus=0 if args.small else world), METRICS, settings={"match": args.match})

    def attempt(name, function, *arguments):
        if not re.search(args.match, name):
            return
        try:
            metrics, details = function(shape, *arguments)
        except Exception as error:  # the other checks still run
            traceback.print_exc()
            result.absent.append(Absent(name, "ours", f"{type(error).__name__}: {str(error)[:300]}"))
        else:
            result.add(name, details=details, **metrics)
            log(name, metrics)

    here = torch.device("cuda", torch.cuda.current_device()) if shape.device == "cuda" else torch.device("cpu")
    reasons = {name: kernel.unsupported(here, shape.dtype, shape.dim, True) for name, kernel in KERNELS.items()}
    usable = [name for name, reason in reasons.items() if reason is None]
    log(reasons)
    for name in usable:
        for causal in (True, False) if name != "cudnn" else (True,):
            for strided in (False, True):
                attempt(f"kernel {name} causal={causal} strided={strided}", check_kernel, KERNELS[name], causal, strided)
    sys.modules["eagle_cp.all_gather"].HEADWISE_ROWS = 4000 // by  # so that "one" is computed one key/value head at a time
    sys.modules["eagle_cp.rank_attention"].LONG_PIECE = 2000 // by  # and its pieces get kernel calls of their own
    packs = {"one": [9001], "mixed": [5003, 1, 700, 1201, 33, 2000], "short": [700, 512, 900, 30, 1, 411, 640]}
    packs = {name: [-(-n // by) for n in lengths] for name, lengths in packs.items()}
    for u, mesh in meshes.items():
        attempt(f"tiles u={u} r={world // u}", check_tiles, mesh)
        for name in usable:
            for pack, lengths in packs.items():
                attempt(f"split u={u} r={world // u} {name} {pack} 28/4", check_split, mesh, name, lengths, (28, 4), True)
            if u < world:
                speed, mesh.all_gather_gb_s = mesh.all_gather_gb_s, 1e-3  # so slow that collectives overlap with the kernels
                attempt(f"split u={u} r={world // u} {name} one 28/4, overlapped", check_split, mesh, name, packs["one"], (28, 4), True)
                mesh.all_gather_gb_s = speed
        attempt(f"split u={u} r={world // u} 9/3", check_split, mesh, None, packs["mixed"], (9, 3), True)
        if u <= 7:  # every Ulysses rank needs a head
            attempt(f"split u={u} r={world // u} 7/1 full", check_split, mesh, None, packs["mixed"], (7, 1), False)
    if dist.get_rank() == 0:
        report(result, args.out)
    dist.destroy_process_group()
    return int(bool(result.absent) or any(case.metrics.get("tiles_exact") == 0 for case in result.cases))


if __name__ == "__main__":
    sys.exit(main())
