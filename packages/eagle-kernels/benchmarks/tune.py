"""Times the launch shapes that the kernels could use. The constants in `eagle_kernels/ops/*/kernel.py` come from here.

python packages/eagle-kernels/benchmarks/tune.py [norm rope swiglu loss matmul] [--out FILE.json] [--best 6]
python packages/eagle-kernels/benchmarks/tune.py --compile 3/8 [...]

--compile I/N: only compile every N-th candidate from the I-th (0 to N - 1), to fill Triton's cache; run N such processes at once.
"""

import argparse
import itertools
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from shapes import BF16, HEAD_DIM, HIDDEN, INNER, K_HEADS, Q_HEADS, TOKENS, VOCAB, inverse_frequencies

from benchmarks.cuda import batch_ms, ceilings, matmul
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.rivals import Absent
from eagle_kernels.matmul import accumulate_
from eagle_kernels.ops.linear_cross_entropy import kernel as cross_entropy
from eagle_kernels.ops.rms_norm import kernel as norm
from eagle_kernels.ops.rope import kernel as rope
from eagle_kernels.ops.swiglu import kernel as swiglu

METRICS = {"ms": Metric("ms", "lower"), "of_ceiling": Metric("", "higher"), "tflops": Metric("TFLOP/s", "higher")}
Candidates = dict[tuple, Callable[[], object]]


class Tuning:
    """Times candidates, or with a shard (index, count) only compiles its part of them."""

    def __init__(self, result: Result, best: int, shard: tuple[int, int] | None) -> None:
        self.result, self.best, self.shard = result, best, shard

    def least_ms(self, moved: float) -> float:
        """Milliseconds that `moved` bytes need at the copy bandwidth."""
        return moved / self.result.ceilings["copy_tb_per_s"] / 1e9

    def race(self, label: str, candidates: Candidates, moved: float) -> None:
        """Add the `best` fastest candidates; those that fail are reported as absent. moved: bytes that the kernel must move."""
        if self.shard:
            index, count = self.shard
            for shape, function in list(candidates.items())[index::count]:
                try:
                    function()
                except Exception as error:
                    print(f"{label} {shape}: {_first_line(error)}")
            return
        times = {}
        least = self.least_ms(moved)
        for shape, function in candidates.items():
            try:
                function()
                times[shape] = statistics.median(batch_ms(function, max(1, int(4.0 / max(least, 0.05)))) for _ in range(5))
            except Exception as error:  # a shape may need more registers or shared memory than there is
                self.result.absent.append(Absent(label, str(shape), _first_line(error)))
        for shape, ms in sorted(times.items(), key=lambda item: item[1])[: self.best]:
            self.result.add(f"{label} {shape}", ms=ms, of_ceiling=least / ms)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def norms(tuning: Tuning) -> None:
    x, dy, residual = (torch.randn(TOKENS, HIDDEN, device="cuda").to(BF16) for _ in range(3))
    weight = torch.randn(HIDDEN, device="cuda").to(BF16)
    y, total = torch.empty_like(x), torch.empty_like(x)
    rstd = torch.empty(TOKENS, device="cuda")
    block = triton.next_power_of_2(HIDDEN)

    def forward(rows: int, warps: int, fused: bool) -> Callable[[], object]:
        return lambda: norm.forward_kernel[(triton.cdiv(TOKENS, rows),)](
            x, residual, weight, y, total, rstd, TOKENS, HIDDEN, HIDDEN, 1e-6,
            COLS=HIDDEN, HAS_RESIDUAL=fused, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip

    shapes = list(itertools.product((1, 2), (2, 4, 8, 16)))
    for fused in (False, True):
        candidates: Candidates = {s: forward(*s, fused) for s in shapes}
        tuning.race(f"norm forward fused={fused} (rows, warps)", candidates, (4 if fused else 2) * x.nbytes)

    def backward(rows: int, warps: int, stages: int, resident: int, fused: bool) -> Callable[[], object]:
        programs = resident * norm.multiprocessors(x)
        partial = torch.empty((programs, HIDDEN), device="cuda")
        dweight = torch.empty(HIDDEN, device="cuda", dtype=BF16)

        def run() -> None:
            norm.backward_kernel[(programs,)](
                dy, residual, x, weight, rstd, y, partial, TOKENS, HIDDEN, HIDDEN,
                COLS=HIDDEN, HAS_DTOTAL=fused, ROWS=rows, BLOCK=block, STAGES=stages, num_warps=warps,
            )  # fmt: skip
            norm.reduce_kernel[(triton.cdiv(HIDDEN, 32),)](partial, dweight, programs, COLS=HIDDEN, ROWS=64, BLOCK=32, num_warps=4)

        return run

    shapes = [s for s in itertools.product((1, 2), (4, 8, 16), (1, 2, 3), (1, 2, 3, 4, 6)) if s[1] * s[3] <= 32]
    for fused in (False, True):
        candidates = {s: backward(*s, fused) for s in shapes}
        tuning.race(f"norm backward fused={fused} (rows, warps, stages, resident)", candidates, (4 if fused else 3) * x.nbytes)


def ropes(tuning: Tuning) -> None:
    q, k = (torch.randn(TOKENS, heads, HEAD_DIM, device="cuda").to(BF16) for heads in (Q_HEADS, K_HEADS))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    positions, inv_freq = torch.arange(TOKENS, device="cuda"), inverse_frequencies()

    def run(tokens: int, parts: int, warps: int) -> Callable[[], object]:
        return lambda: rope.rope_kernel[(triton.cdiv(TOKENS, tokens), parts)](
            q, k, q_out, k_out, positions, inv_freq, TOKENS,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            Q_HEADS=Q_HEADS, K_HEADS=K_HEADS, HALF=HEAD_DIM // 2, SIGN=1.0, TOKENS=tokens, BLOCK=HEAD_DIM // 2, num_warps=warps,
        )  # fmt: skip

    shapes = list(itertools.product((4, 8, 16, 32), (1, 2, 4), (1, 2, 4)))
    tuning.race("rope (tokens, parts, warps)", {s: run(*s) for s in shapes}, 2 * (q.nbytes + k.nbytes))


def swiglus(tuning: Tuning) -> None:
    gate, up, dout = (torch.randn(TOKENS, INNER, device="cuda").to(BF16) for _ in range(3))
    out, dgate, dup = (torch.empty_like(gate) for _ in range(3))
    n = gate.numel()
    shapes = list(itertools.product((1024, 2048, 4096), (2, 4, 8)))

    def forward(block: int, warps: int) -> Callable[[], object]:
        blocks = triton.cdiv(n, block)
        return lambda: swiglu.forward_kernel[(blocks,)](gate, up, out, n, blocks, n, n, BLOCK=block, num_warps=warps)

    def backward(block: int, warps: int, rebuild: bool) -> Callable[[], object]:
        blocks = triton.cdiv(n, block)
        return lambda: swiglu.backward_kernel[(blocks,)](
            dout, gate, up, dgate, dup, out, n, blocks, n, n, n, REBUILD=rebuild, BLOCK=block, num_warps=warps
        )

    tuning.race("swiglu forward (block, warps)", {s: forward(*s) for s in shapes}, 3 * gate.nbytes)
    tuning.race("swiglu backward (block, warps)", {s: backward(*s, False) for s in shapes}, 5 * gate.nbytes)
    tuning.race("swiglu backward + activation (block, warps)", {s: backward(*s, True) for s in shapes}, 6 * gate.nbytes)


def losses(tuning: Tuning) -> None:
    logits = torch.randn(3584, VOCAB, device="cuda").to(BF16)
    labels = torch.randint(0, VOCAB, (3584,), device="cuda")
    found, weighted = torch.empty(3584, device="cuda"), torch.empty(3584, device="cuda")

    def run(block: int, warps: int) -> Callable[[], object]:
        return lambda: cross_entropy.loss_kernel[(3584,)](
            logits, labels, labels, found, found, weighted, 0, VOCAB, 0.0, 0.0,
            HAS_INDEX=False, HAS_WEIGHTS=False, SMOOTHING=False, GRADIENT=True,
            PRECISE=False, BLOCK=block, num_warps=warps,
        )  # fmt: skip

    shapes = [(1024, 4), (1024, 8), (2048, 4), (2048, 8), (2048, 16), (4096, 8), (4096, 16), (4096, 32), (8192, 16), (8192, 32)]
    tuning.race("loss (block, warps)", {s: run(*s) for s in shapes}, 2 * logits.nbytes)
    if tuning.shard:
        return
    gradient = torch.randn(VOCAB, HIDDEN, device="cuda")
    one = torch.ones((), device="cuda")
    for label, dtype, in_place in (("scale to bf16", BF16, False), ("scale in place by 1", torch.float32, True)):
        ms = batch_ms(lambda dtype=dtype, in_place=in_place: cross_entropy.launch_scale(gradient, one, None, dtype, in_place), 5)
        tuning.result.add(label, ms=ms)


def matmuls(tuning: Tuning) -> None:
    weight = torch.randn(VOCAB, HIDDEN, device="cuda").to(BF16)
    gradient = torch.empty(VOCAB, HIDDEN, device="cuda")
    square = matmul()

    def measure(rows: int) -> dict[str, float]:
        hidden = torch.randn(rows, HIDDEN, device="cuda").to(BF16)
        logits = torch.randn(rows, VOCAB, device="cuda").to(BF16)
        dhidden, out = torch.empty_like(hidden), torch.empty_like(logits)
        operations = 2.0 * rows * VOCAB * HIDDEN
        products = {
            "8192^3": square,
            "logits": (lambda: torch.mm(hidden, weight.t(), out=out), operations),
            "dhidden": (lambda: torch.mm(logits, weight, out=dhidden), operations),
            "dweight first": (lambda: accumulate_(gradient, logits.t(), hidden, True), operations),
            "dweight": (lambda: accumulate_(gradient, logits.t(), hidden, False), operations),
        }
        rates = {}
        for name, (function, count) in products.items():
            function()
            rates[name] = count / statistics.median(batch_ms(function, 4) for _ in range(5)) / 1e9
        return rates

    if tuning.shard:
        return
    for rows in (2048, 2304, 3072, 3584, 3712, 4096, 4608):
        for name, rate in measure(rows).items():
            tuning.result.add(f"matmul {name}, {rows} rows", tflops=rate)


GROUPS = {"norm": norms, "rope": ropes, "swiglu": swiglus, "loss": losses, "matmul": matmuls}


def shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I below N")
    return int(index), int(count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--compile", type=shard, metavar="I/N", help="only compile this part of the candidates")
    parser.add_argument("--best", type=int, default=6, help="candidates per kernel in the result (default: 6)")
    add_out(parser)
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"unknown groups {', '.join(sorted(unknown))}; expected some of {', '.join(GROUPS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    torch.manual_seed(0)
    settings = {"groups": options.groups, "best": options.best}
    result = Result("eagle-kernels/tune", environment(("torch", "triton")), METRICS, settings=settings)
    if not options.compile:
        result.ceilings = ceilings()
    tuning = Tuning(result, options.best, options.compile)
    failed = False
    for name in options.groups:
        try:
            GROUPS[name](tuning)
        except Exception:  # the other groups are still measured
            traceback.print_exc()
            failed = True
        torch.cuda.empty_cache()
    if not options.compile:
        report(result, options.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
