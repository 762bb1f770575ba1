"""The time of an optimizer's step by itself, next to torch's and torchao's.

    python packages/eagle-train/benchmarks/optimizers.py [--small] [--out FILE.json]

Matrices of the 8B decoder's MLPs with random gradients of the weights' dtype, no clipping. `bytes_per_parameter`: what a step must read
and write at least (weights and states twice, gradients once); `copy_share`: the rate at which it does, over that of a copy on this device.
`--small`: small matrices on the CPU, to see that it runs.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.rivals import Absent
from benchmarks.timing import medians
from eagle_train.config import StageConfig
from eagle_train.training.optim import OPTIMIZERS

METRICS = {
    "ms": Metric("ms", "lower"),
    "bytes_per_parameter": Metric("", "none"),
    "copy_share": Metric("of a copy's rate", "higher"),
}
LR, BETAS, EPS = 1e-5, (0.9, 0.95), 1e-8


class Contender(NamedTuple):
    """make: from the parameters. states: bytes of them per parameter."""

    name: str
    case: str
    dtype: torch.dtype
    states: int
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def ours(optimizer: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    stage = StageConfig(name="one", max_tokens=32768, optimizer=optimizer, lr=LR, betas=BETAS, eps=EPS)  # pyright: ignore[reportArgumentType]
    group: dict[str, Any] = {"params": parameters, "weight_decay": 0.1}
    if parameters[0].dtype == torch.bfloat16:
        group["names"] = [str(number) for number in range(len(parameters))]
    return OPTIMIZERS[optimizer].make([group], stage)


def fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1, fused=True)


def torchao(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    stochastic = parameters[0].dtype == torch.bfloat16
    return AdamW8bit(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1, bf16_stochastic_round=stochastic)


def contenders() -> list[Contender]:
    """torch's bfloat16 AdamW keeps states in bfloat16 and rounds to the nearest: less work, other results."""
    full, half = torch.float32, torch.bfloat16
    return [
        Contender("ours", "adamw8bit, bfloat16 weights", half, 2, partial(ours, "adamw8bit")),
        Contender("torchao, compiled", "adamw8bit, bfloat16 weights", half, 2, torchao),
        Contender("ours", "adamw8bit, float32 weights", full, 2, partial(ours, "adamw8bit")),
        Contender("torchao, compiled", "adamw8bit, float32 weights", full, 2, torchao),
        Contender("ours", "adamw, bfloat16 weights", half, 8, partial(ours, "adamw")),
        Contender("torch, fused, states in bfloat16", "adamw, bfloat16 weights", half, 4, fused),
        Contender("torch, fused (ours is the same)", "adamw, float32 weights", full, 8, fused),
    ]


def milliseconds(step: Callable[[], object], rounds: int, device: str) -> float:
    """The median of a step's times; the device's work included."""
    if device == "cuda":
        from benchmarks.cuda import interleaved_ms

        return medians(interleaved_ms({"step": step}, rounds=rounds))["step"]
    from time import perf_counter

    times = []
    for _ in range(rounds):
        begin = perf_counter()
        step()
        times.append((perf_counter() - begin) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small matrices on the CPU")
    add_out(parser)
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --small runs on the CPU")
    device = "cpu" if options.small else "cuda"
    shapes = [(256, 64)] * 2 if options.small else [(18944, 3584)] * 6
    count = sum(rows * columns for rows, columns in shapes)
    gpus = 0 if options.small else 1
    result = Result(
        "eagle-train/optimizers", environment(("torch", "triton", "torchao"), gpus=gpus), METRICS, settings={"parameters": count}
    )
    if not options.small:
        from benchmarks.cuda import ceilings

        result.ceilings = ceilings()
    for name, case, dtype, states, make in contenders():
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        try:
            optimizer = make(parameters)
            optimizer.step()  # states are made, and kernels compiled
            ms = milliseconds(optimizer.step, 3 if options.small else 7, device)
        except Exception as error:
            result.absent.append(Absent(case, name, f"{type(error).__name__}: {error}"[:200]))
            continue
        least = 2 * (dtype.itemsize + states) + dtype.itemsize
        figures = {"ms": ms, "bytes_per_parameter": least}
        if not options.small:
            figures["copy_share"] = least * count / (ms / 1e3) / (result.ceilings["copy_tb_per_s"] * 1e12)
        result.add(f"{case}, {count / 1e9:.2f} B parameters", name, **figures)
        print(f"{case}, {name}: {ms:.2f} ms", flush=True)
        del optimizer, parameters
    report(result, options.out)


if __name__ == "__main__":
    main()
