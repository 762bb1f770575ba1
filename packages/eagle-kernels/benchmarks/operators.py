"""Every operator against its rivals at the shapes of an 8B model, all in one process on the same data. Needs an NVIDIA GPU.

python packages/eagle-kernels/benchmarks/operators.py [norms rope swiglu gelu head] [--out FILE.json]

`of_ceiling`: the least possible time divided by the measured time. The least time is that of the bytes that must move at this run's copy
bandwidth, or that of the operations at its rate of bf16 matmuls. Exits with 1 if one of our operators fails.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
import rivals
from shapes import BF16, HEAD_DIM, HIDDEN, INNER, K_HEADS, Q_HEADS, TOKENS, VOCAB, inverse_frequencies, random

import eagle_kernels
from benchmarks.cuda import ceilings, interleaved_ms, matmul, peak_extra_bytes
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.rivals import Absent, Rival, load, working
from benchmarks.timing import medians

LIBRARIES = ("torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy")
METRICS = {
    "ms": Metric("ms", "lower"),
    "of_ceiling": Metric("", "higher"),
    "peak_extra_gib": Metric("GiB", "lower"),
    "peak_beyond_fp32_weight_gradient_gib": Metric("GiB", "none"),
    "matmul_tflops_in_turn": Metric("TFLOP/s", "none"),
}


def contenders(result: Result, case: str, ours: Callable, others: list[Rival], trial: Callable[[Callable], object]) -> dict[str, Callable]:
    """Ours and the rivals for which `trial` works here; the others are added to `result.absent`."""

    def complete(function: Callable) -> None:
        trial(function)
        torch.cuda.synchronize()

    loaded, missing = load(case, others)
    found, failed = working(case, {"ours": ours} | loaded, complete)
    result.absent += missing + failed
    return found


def backward_of(function: Callable, inputs: tuple) -> Callable[[], object]:
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in inputs if x.requires_grad]
    gradients = [torch.randn_like(part) for part in out]
    return lambda: torch.autograd.grad(out, leaves, gradients, retain_graph=True)


def add_times(result: Result, case: str, times: dict[str, float], ceiling_ms: float) -> None:
    for name, ms in times.items():
        result.add(case, name, ms=ms, of_ceiling=ceiling_ms / ms)


def streamed(result: Result, operator: str, ours: Callable, others: list[Rival], inputs: tuple, moved: tuple[float, float]) -> None:
    """Forward and backward of an operator that is limited by memory. moved: bytes that forward and backward must move."""

    def trial(function: Callable) -> None:
        with torch.no_grad():
            function(*inputs)
        backward_of(function, inputs)()

    found = contenders(result, operator, ours, others, trial)
    least = [size / result.ceilings["copy_tb_per_s"] / 1e9 for size in moved]
    forward = {name: lambda function=function: function(*inputs) for name, function in found.items()}
    add_times(result, f"{operator} forward", medians(interleaved_ms(forward)), least[0])
    times = {}
    for name, function in found.items():  # one at a time, because every graph holds its own saved tensors
        times |= medians(interleaved_ms({name: backward_of(function, inputs)}))
    add_times(result, f"{operator} backward", times, least[1])


def norms(result: Result) -> None:
    x, residual, weight = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN), random(HIDDEN)
    size = x.nbytes
    streamed(result, "RMSNorm", eagle_kernels.rms_norm, rivals.RMS_NORM, (x, weight), (2 * size, 3 * size))
    streamed(result, "add+RMSNorm", eagle_kernels.add_rms_norm, rivals.ADD_RMS_NORM, (residual, x, weight), (4 * size, 4 * size))


def rope(result: Result) -> None:
    q, k = random(TOKENS, Q_HEADS, HEAD_DIM), random(TOKENS, K_HEADS, HEAD_DIM)
    positions, inv_freq = torch.arange(TOKENS, device="cuda"), inverse_frequencies()
    angles = positions.float()[:, None] * inv_freq
    cos, sin = (torch.cat((part, part), dim=-1).to(BF16) for part in (angles.cos(), angles.sin()))
    size = 2.0 * (q.nbytes + k.nbytes)

    def ours(q: torch.Tensor, k: torch.Tensor, *_: Any) -> object:
        return eagle_kernels.rope(q, k, positions, inv_freq)

    streamed(result, "RoPE", ours, rivals.ROPE, (q, k, cos, sin), (size, size))


def swiglu(result: Result) -> None:
    gate, up = random(TOKENS, INNER), random(TOKENS, INNER)
    streamed(result, "SwiGLU", eagle_kernels.swiglu, rivals.SWIGLU, (gate, up), (3 * gate.nbytes, 5 * gate.nbytes))


def gelu(result: Result) -> None:
    """The first MLP projection of the vision tower: 64 tiles of 1024 patches."""
    x, weight, bias = random(65536, 1152), random(4304, 1152, scale=0.03), random(4304)
    found = contenders(result, "gelu_linear", eagle_kernels.gelu_linear, rivals.GELU, lambda function: function(x, weight, bias))
    product, operations = matmul()

    def without_gradient(function: Callable) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(x, weight, bias)

        return run

    times = medians(interleaved_ms({name: without_gradient(function) for name, function in found.items()} | {"8192^3": product}))
    rate = operations / times.pop("8192^3")
    add_times(result, "gelu_linear forward, no gradient", times, 2.0 * 65536 * 1152 * 4304 / rate)
    dout = random(65536, 4304).detach()

    def both(function: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x, weight, bias), (x, weight, bias), dout)

    found.pop("quack", None)  # see rivals.GELU
    times = medians(interleaved_ms({name: both(function) for name, function in found.items()}))
    add_times(result, "gelu_linear forward + backward", times, 6.0 * 65536 * 1152 * 4304 / rate)


def head(result: Result, fractions: tuple[float, ...] = (1.0, 0.5, 0.1)) -> None:
    hidden, weight = random(TOKENS, HIDDEN), random(VOCAB, HIDDEN, scale=0.02)
    product, operations = matmul()
    for fraction in fractions:
        labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
        labels[torch.rand(TOKENS, device="cuda") >= fraction] = -100
        kept = int((labels >= 0).sum())
        denominator = torch.tensor(float(kept), device="cuda")

        def ours(h, w, y, denominator=denominator, kept=kept):
            return eagle_kernels.linear_cross_entropy(h, w, y, denominator=denominator, num_kept=kept)

        def both(function: Callable, labels=labels) -> Callable[[], object]:
            return lambda: torch.autograd.grad(function(hidden, weight, labels), (hidden, weight))

        case = f"linear + cross-entropy, {fraction:.0%} labelled"
        found = contenders(result, case, ours, rivals.HEAD, lambda function: both(function)())
        runs = {name: both(function) for name, function in found.items()}
        times = medians(interleaved_ms(runs, rounds=7, batch=60.0))
        # The clock falls under load, so the ceiling is the rate of matmuls in turn with ours, in equally long batches at one temperature.
        pair = {"ours": runs["ours"], "8192^3": product}
        warm = medians(interleaved_ms(pair, rounds=5, batch=max(60.0, times["ours"]), most=400))
        rate = operations / warm["8192^3"]
        least = 6.0 * kept * VOCAB * HIDDEN / rate
        for name, ms in times.items():
            peak = peak_extra_bytes(runs[name])
            result.add(
                case, name, ms=ms, of_ceiling=least / (warm["ours"] if name == "ours" else ms), peak_extra_gib=peak / 2**30,
                peak_beyond_fp32_weight_gradient_gib=(peak - 4.0 * VOCAB * HIDDEN) / 2**30, matmul_tflops_in_turn=rate / 1e9,
            )  # fmt: skip


GROUPS = {"norms": norms, "rope": rope, "swiglu": swiglu, "gelu": gelu, "head": head}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    add_out(parser)
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"unknown groups {', '.join(sorted(unknown))}; expected some of {', '.join(GROUPS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available")

    torch.manual_seed(0)
    result = Result("eagle-kernels/operators", environment(LIBRARIES), METRICS, ceilings=ceilings(), settings={"groups": options.groups})
    failed = False
    for name in options.groups:
        try:
            GROUPS[name](result)
        except Exception as error:  # the other groups are still measured
            traceback.print_exc()
            result.absent.append(Absent(name, "ours", f"{type(error).__name__}: {str(error)[:200]}"))
            failed = True
        torch.cuda.empty_cache()
    report(result, options.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
