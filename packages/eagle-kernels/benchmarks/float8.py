"""Linear layers with products of 8-bit floats: errors of every layer of an 8B decoder, and on a GPU their times.

    python packages/eagle-kernels/benchmarks/float8.py [--small] [--out FILE.json]

Errors are |found - exact| / |exact| of the output, the input's gradient and the weight's gradient; exact is float32 on the values as they
are in bf16. Inputs are normal, as after a norm; `outliers` multiplies one feature in a hundred by 20. `slow sums` moves partial sums to
float32 registers in all products, `fast sums` in none. --small: small sizes on the CPU, errors only, which multiply the rounded values.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from shapes import HEAD_DIM, HIDDEN, INNER, K_HEADS, Q_HEADS, TOKENS

from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.timing import medians
from eagle_kernels import float8_linear, float8_mlp, swiglu_mlp
from eagle_kernels.ops.float8 import function
from eagle_kernels.ops.float8.rounding import by_columns, by_rows, product, swiglu_by_rows

METRICS = {
    "output_error": Metric("", "lower"),
    "input_gradient_error": Metric("", "lower"),
    "weight_gradient_error": Metric("", "lower"),
    "ms": Metric("ms", "lower"),
    "tflops": Metric("TFLOP/s", "higher"),
    "tb_per_s": Metric("TB/s", "higher"),
}
SUMS = ("FAST_OUTPUT", "FAST_INPUT_GRADIENT", "FAST_WEIGHT_GRADIENT")


def layers(small: bool) -> dict[str, tuple[int, int]]:
    """Sizes of the layers: (inputs, outputs)."""
    if small:
        return {"q_proj": (224, 224), "k_proj": (224, 32), "gate_proj": (224, 1184), "down_proj": (1184, 224)}
    heads, kv_heads = Q_HEADS * HEAD_DIM, K_HEADS * HEAD_DIM
    sizes = {"q_proj": (HIDDEN, heads), "k_proj": (HIDDEN, kv_heads), "o_proj": (heads, HIDDEN)}
    return sizes | {"gate_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}


def gradients(run: Callable, x: torch.Tensor, weight: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients of a linear layer."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = run(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), dout)


def whose(contender: str) -> str:
    return "torch" if contender == "bf16" else "ours"


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


def linear(x: torch.Tensor, weight: torch.Tensor, *, exact: bool) -> torch.Tensor:
    return float8_linear(x, weight, exact_weight_gradient=exact)


def errors(result: Result, small: bool, device: str) -> None:
    tokens = 500 if small else TOKENS
    rowwise = functools.partial(linear, exact=False)
    contenders: dict[str, tuple[Callable, bool | None]] = {
        "bf16": (F.linear, None),
        "fp8 rowwise": (rowwise, None),
        "fp8 rowwise_with_gw_hp": (functools.partial(linear, exact=True), None),
    }
    if device == "cuda":
        contenders |= {"fp8 rowwise, slow sums": (rowwise, False), "fp8 rowwise, fast sums": (rowwise, True)}
    for name, (narrow, wide) in layers(small).items():
        for kind in ("normal", "outliers"):
            generator = torch.Generator(device).manual_seed(0)
            x, weight, dout = (
                torch.randn(size, generator=generator, device=device) for size in ((tokens, narrow), (wide, narrow), (tokens, wide))
            )
            if kind == "outliers":
                x[:, ::100] *= 20
            x, weight, dout = (one.bfloat16() for one in (x, weight / narrow**0.5, dout))
            exact = gradients(F.linear, x.float(), weight.float(), dout.float())
            for contender, (run, fast) in contenders.items():
                switched = {sums: getattr(function, sums) if fast is None else fast for sums in SUMS}
                try:
                    with mock.patch.multiple(function, **switched):
                        found = [error(*pair) for pair in zip(gradients(run, x, weight, dout), exact)]
                except RuntimeError as failure:
                    print(f"{name}, {kind}, {contender}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
                    continue
                names = ("output_error", "input_gradient_error", "weight_gradient_error")
                result.add(f"{name}, {narrow} -> {wide}, {kind}, {contender}", whose(contender), **dict(zip(names, found)))
                print(f"{name}, {kind}, {contender}: {', '.join(f'{one:.4f}' for one in found)}", flush=True)
            del x, weight, dout, exact


def timed(result: Result, case: str, contenders: dict[str, Callable], flops: float = 0.0, moved: float = 0.0) -> None:
    """Milliseconds of each, in turn. flops: operations of a call; moved: bytes that it must move."""
    from benchmarks.cuda import interleaved_ms

    working = {}
    for name, run in contenders.items():
        try:
            run()
            torch.cuda.synchronize()
            working[name] = run
        except RuntimeError as failure:
            print(f"{case}, {name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
    for name, ms in medians(interleaved_ms(working, rounds=5)).items():
        rates = {"tflops": flops / ms / 1e9} if flops else {"tb_per_s": moved / ms / 1e9} if moved else {}
        result.add(f"{case}, {name}", whose(name), ms=ms, **rates)
        print(f"{case}, {name}: {ms:.3f} ms {rates}", flush=True)


def times(result: Result) -> None:
    """Products, rounding and the MLP at the sizes of the 8B and 32768 tokens."""
    for name, (narrow, wide) in layers(False).items():
        x = torch.randn(TOKENS, narrow, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(wide, narrow, device="cuda", dtype=torch.bfloat16) / narrow**0.5
        dout = torch.randn(TOKENS, wide, device="cuda", dtype=torch.bfloat16)
        pairs = {
            "output": (by_rows(x), by_rows(weight), TOKENS, lambda x=x, weight=weight: x @ weight.t()),
            "input gradient": (by_rows(dout), by_columns(weight), TOKENS, lambda dout=dout, weight=weight: dout @ weight),
            "weight gradient": (by_columns(dout), by_columns(x), wide, lambda dout=dout, x=x: dout.t() @ x),
        }
        for which, (a, b, rows, plain) in pairs.items():
            run = functools.partial(product, a, b, rows, torch.bfloat16)
            contenders = {"bf16": plain, "fp8, fast sums": functools.partial(run, fast=True)}
            contenders["fp8, slow sums"] = functools.partial(run, fast=False)
            timed(result, f"{name}, product of {which}", contenders, flops=2.0 * TOKENS * narrow * wide)
        del pairs, run, contenders, a, b, plain
        size = TOKENS * narrow
        timed(result, f"{name}, input by rows", {"fp8": lambda x=x: by_rows(x)}, moved=3.0 * size)
        timed(result, f"{name}, input by columns", {"fp8": lambda x=x: by_columns(x)}, moved=5.0 * size)
        timed(result, f"{name}, weight by rows", {"fp8": lambda weight=weight: by_rows(weight)}, moved=3.0 * narrow * wide)
        timed(result, f"{name}, weight by columns", {"fp8": lambda weight=weight: by_columns(weight)}, moved=5.0 * narrow * wide)
        del x, weight, dout
    gate, up = (torch.randn(TOKENS, INNER, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timed(result, "swiglu by rows", {"fp8": functools.partial(swiglu_by_rows, gate, up)}, moved=5.0 * gate.numel())
    del gate, up
    mlp(result)


def mlp(result: Result) -> None:
    shapes = (TOKENS, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    inputs = [(torch.randn(shape, device="cuda") / shape[1] ** 0.5).bfloat16().requires_grad_() for shape in shapes]
    inputs[0] = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    runs: dict[str, Callable] = {
        "bf16": functools.partial(swiglu_mlp, recompute=True),
        "fp8 rowwise": functools.partial(float8_mlp, recompute=True),
        "fp8 rowwise_with_gw_hp": functools.partial(float8_mlp, recompute=True, exact_weight_gradient=True),
    }
    flops = 6.0 * TOKENS * HIDDEN * INNER
    timed(result, "MLP, forward", {name: lambda run=run: run(*inputs) for name, run in runs.items()}, flops=flops)

    def both(run: Callable) -> object:
        return torch.autograd.grad(run(*inputs), inputs, dout)

    steps = {name: functools.partial(both, run) for name, run in runs.items()}
    timed(result, "MLP, forward and backward, gate and up computed again", steps, flops=3 * flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU: errors only")
    add_out(parser)
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --small runs on the CPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    gpu = {} if options.small else {"gpus": 1}
    result = Result("eagle-kernels/float8", environment(("torch", "triton"), **gpu), METRICS, settings={"small": options.small})
    errors(result, options.small, "cpu" if options.small else "cuda")
    if not options.small:
        from benchmarks.cuda import ceilings

        result.ceilings = ceilings()
        times(result)
    report(result, options.out)


if __name__ == "__main__":
    main()
