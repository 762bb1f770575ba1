"""Times the launch shapes that the kernels could use: where the constants in `eagle_kernels.kernels` come from.

python -m benchmarks.tune [norm rope swiglu loss matmul]
    python -m benchmarks.tune --compile 3/8 [...]   only compiles, every eighth candidate from the third: run eight of them at once first
"""

import itertools
import statistics
import sys
import traceback
from collections.abc import Callable

import torch
import triton

from benchmarks.operators import BF16, HEAD_DIM, HIDDEN, INNER, K_HEADS, Q_HEADS, TOKENS, VOCAB
from benchmarks.timing import batch_ms, copy_bandwidth
from eagle_kernels.kernels import cross_entropy, rope, swiglu
from eagle_kernels.kernels import rms_norm as norm
from eagle_kernels.matmul import accumulate_

BEST = 6  # lines printed per kernel
SHARD: tuple[int, ...] = ()


def race(label: str, candidates: dict[tuple, Callable[[], object]], roof_ms: float) -> None:
    times = {}
    if SHARD:
        index, count = SHARD
        candidates = {shape: function for number, (shape, function) in enumerate(candidates.items()) if number % count == index}
    for shape, function in candidates.items():
        try:
            function()
            if SHARD:
                continue
            times[shape] = statistics.median(batch_ms(function, max(1, int(4.0 / max(roof_ms, 0.05)))) for _ in range(5))
        except Exception as error:
            print(f"{label} {shape}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    for shape, ms in sorted(times.items(), key=lambda item: item[1])[:BEST]:
        print(f"{label} {shape}: {ms:.4f} ms, {roof_ms / ms:.3f} of roof")


def norms(bandwidth: float) -> None:
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
        roof = (4 if fused else 2) * x.nbytes / bandwidth * 1e3
        race(f"norm forward fused={fused} (rows, warps)", {s: forward(*s, fused) for s in shapes}, roof)

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
        roof = (4 if fused else 3) * x.nbytes / bandwidth * 1e3
        race(f"norm backward fused={fused} (rows, warps, stages, resident)", {s: backward(*s, fused) for s in shapes}, roof)


def ropes(bandwidth: float) -> None:
    q, k = (torch.randn(TOKENS, heads, HEAD_DIM, device="cuda").to(BF16) for heads in (Q_HEADS, K_HEADS))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    positions = torch.arange(TOKENS, device="cuda")
    inv_freq = 1e6 ** (-torch.arange(0, HEAD_DIM, 2, device="cuda", dtype=torch.float32) / HEAD_DIM)

    def run(tokens: int, parts: int, warps: int) -> Callable[[], object]:
        return lambda: rope.rope_kernel[(triton.cdiv(TOKENS, tokens), parts)](
            q, k, q_out, k_out, positions, inv_freq, TOKENS,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            Q_HEADS=Q_HEADS, K_HEADS=K_HEADS, HALF=HEAD_DIM // 2, SIGN=1.0, TOKENS=tokens, BLOCK=HEAD_DIM // 2, num_warps=warps,
        )  # fmt: skip

    shapes = list(itertools.product((4, 8, 16, 32), (1, 2, 4), (1, 2, 4)))
    race("rope (tokens, parts, warps)", {s: run(*s) for s in shapes}, 2 * (q.nbytes + k.nbytes) / bandwidth * 1e3)


def swiglus(bandwidth: float) -> None:
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

    race("swiglu forward (block, warps)", {s: forward(*s) for s in shapes}, 3 * gate.nbytes / bandwidth * 1e3)
    race("swiglu backward (block, warps)", {s: backward(*s, False) for s in shapes}, 5 * gate.nbytes / bandwidth * 1e3)
    race("swiglu backward + rebuild (block, warps)", {s: backward(*s, True) for s in shapes}, 6 * gate.nbytes / bandwidth * 1e3)


def losses(bandwidth: float) -> None:
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
    race("loss (block, warps)", {s: run(*s) for s in shapes}, 2 * logits.nbytes / bandwidth * 1e3)
    gradient = torch.randn(VOCAB, HIDDEN, device="cuda")
    one = torch.ones((), device="cuda")
    print(f"scale to bf16 {batch_ms(lambda: cross_entropy.launch_scale(gradient, one, None, BF16, False), 5):.3f} ms")
    print(f"scale in place by one {batch_ms(lambda: cross_entropy.launch_scale(gradient, one, None, torch.float32, True), 5):.3f} ms")


def matmuls(_: float) -> None:
    weight = torch.randn(VOCAB, HIDDEN, device="cuda").to(BF16)
    gradient = torch.empty(VOCAB, HIDDEN, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda").to(BF16) for _ in range(2))
    square = torch.empty_like(a)

    def measure(rows: int) -> dict[str, float]:
        hidden = torch.randn(rows, HIDDEN, device="cuda").to(BF16)
        logits = torch.randn(rows, VOCAB, device="cuda").to(BF16)
        dhidden, out = torch.empty_like(hidden), torch.empty_like(logits)
        operations = 2.0 * rows * VOCAB * HIDDEN
        products = {
            "square": (lambda: torch.mm(a, b, out=square), 2.0 * 8192**3),
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

    for rows in (2048, 2304, 3072, 3584, 3712, 4096, 4608):
        print(f"matmul rows {rows}: " + ", ".join(f"{name} {rate:.0f}" for name, rate in measure(rows).items()) + " TFLOP/s")


GROUPS = {"norm": norms, "rope": ropes, "swiglu": swiglus, "loss": losses, "matmul": matmuls}

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--compile"]:
        SHARD = tuple(int(part) for part in arguments[1].split("/"))
        arguments = arguments[2:]
    torch.manual_seed(0)
    measured = copy_bandwidth(0.25) if SHARD else copy_bandwidth()
    print(f"copy {measured / 1e12:.3f} TB/s")
    for name in arguments or GROUPS:
        try:
            GROUPS[name](measured)
        except Exception:
            print(f"{name} failed: {traceback.format_exc()[-1500:]}")
        torch.cuda.empty_cache()
