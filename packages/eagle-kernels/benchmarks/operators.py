"""The measurements: every operator at the shapes of an 8B model, everyone in the same process on the same data."""

from collections.abc import Callable
from typing import Any

import torch

import eagle_kernels
from benchmarks import rivals
from benchmarks.timing import interleaved_ms, matmul, peak_extra_bytes

TOKENS, HIDDEN, INNER, Q_HEADS, K_HEADS, HEAD_DIM, VOCAB = 32768, 3584, 18944, 28, 4, 128, 152064
BF16 = torch.bfloat16
Row = dict[str, Any]


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(BF16).requires_grad_()


def ready(contenders: dict[str, Callable], failures: list[str], label: str, check: Callable[[Callable], object]) -> dict[str, Callable]:
    """The contenders that run here; what doesn't is reported, not hidden."""
    out = {}
    for name, function in contenders.items():
        try:
            check(function)
            torch.cuda.synchronize()
            out[name] = function
        except Exception as error:
            failures.append(f"{label}: {name} doesn't run here: {type(error).__name__}: {str(error)[:200]}")
    return out


def backward_of(function: Callable, inputs: tuple) -> Callable[[], object]:
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in inputs if x.requires_grad]
    gradients = [torch.randn_like(part) for part in out]
    return lambda: torch.autograd.grad(out, leaves, gradients, retain_graph=True)


def rows(operator: str, times: dict[str, float], roof_ms: float) -> list[Row]:
    return [{"operator": operator, "contender": name, "ms": ms, "of_roof": roof_ms / ms} for name, ms in times.items()]


def streamed(
    operator: str, contenders: dict[str, Callable], inputs: tuple, forward_bytes: float, backward_bytes: float, bandwidth: float,
    failures: list[str], with_backward: bool = True,
) -> list[Row]:  # fmt: skip
    """Forward and backward of a memory-bound operator; inputs that a contender may destroy (Liger's SwiGLU) come last in the order."""

    def trial(function: Callable) -> None:
        with torch.no_grad():
            function(*inputs)
        if with_backward:
            backward_of(function, inputs)()

    contenders = ready(contenders, failures, operator, trial)

    def forward(function: Callable) -> Callable[[], object]:
        return lambda: function(*inputs)

    out = rows(f"{operator} forward", interleaved_ms({n: forward(f) for n, f in contenders.items()}), forward_bytes / bandwidth * 1e3)
    if with_backward:
        times = {}
        for name, function in contenders.items():  # one at a time: every graph holds its own saved tensors
            times[name] = interleaved_ms({name: backward_of(function, inputs)})[name]
        out += rows(f"{operator} backward", times, backward_bytes / bandwidth * 1e3)
    return out


def norms(bandwidth: float, failures: list[str]) -> list[Row]:
    x, residual, weight = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN), random(HIDDEN)
    size = x.nbytes
    out = streamed("RMSNorm", {"ours": eagle_kernels.rms_norm} | rivals.rms_norms(), (x, weight), 2 * size, 3 * size, bandwidth, failures)
    contenders = {"ours": eagle_kernels.add_rms_norm} | rivals.add_rms_norms()
    return out + streamed("add+RMSNorm", contenders, (residual, x, weight), 4 * size, 4 * size, bandwidth, failures)


def rope(bandwidth: float, failures: list[str]) -> list[Row]:
    q, k = random(TOKENS, Q_HEADS, HEAD_DIM), random(TOKENS, K_HEADS, HEAD_DIM)
    positions = torch.arange(TOKENS, device="cuda")
    inv_freq = 1e6 ** (-torch.arange(0, HEAD_DIM, 2, device="cuda", dtype=torch.float32) / HEAD_DIM)
    angles = positions.float()[:, None] * inv_freq
    cos, sin = (torch.cat((part, part), dim=-1).to(BF16) for part in (angles.cos(), angles.sin()))
    size = 2.0 * (q.nbytes + k.nbytes)
    contenders = {"ours": lambda q, k, *_: eagle_kernels.rope(q, k, positions, inv_freq)} | rivals.ropes()
    return streamed("RoPE", contenders, (q, k, cos, sin), size, size, bandwidth, failures)


def swiglu(bandwidth: float, failures: list[str]) -> list[Row]:
    gate, up = random(TOKENS, INNER), random(TOKENS, INNER)
    size = gate.nbytes
    return streamed("SwiGLU", {"ours": eagle_kernels.swiglu} | rivals.swiglus(), (gate, up), 3 * size, 5 * size, bandwidth, failures)


def gelu(_: float, failures: list[str]) -> list[Row]:
    """The vision tower's fc1: 64 tiles of 1024 patches."""
    x, weight, bias = random(65536, 1152), random(4304, 1152, scale=0.03), random(4304)
    contenders = ready(
        {"ours": lambda *a: eagle_kernels.gelu_linear(*a)} | rivals.gelus(),
        failures,
        "gelu_linear",
        lambda function: function(x, weight, bias),
    )
    product, operations = matmul()

    def without_gradient(function: Callable) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(x, weight, bias)

        return run

    times = interleaved_ms({name: without_gradient(function) for name, function in contenders.items()} | {"8192^3": product})
    rate = operations / times.pop("8192^3")
    out = rows("gelu_linear forward, no gradient", times, 2.0 * 65536 * 1152 * 4304 / rate)
    dout = random(65536, 4304).detach()

    def both(function: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x, weight, bias), (x, weight, bias), dout)

    contenders.pop("quack", None)
    times = interleaved_ms({name: both(function) for name, function in contenders.items()})
    return out + rows("gelu_linear forward + backward", times, 6.0 * 65536 * 1152 * 4304 / rate)


def head(_: float, failures: list[str], fractions: tuple[float, ...] = (1.0, 0.5, 0.1)) -> list[Row]:
    hidden, weight = random(TOKENS, HIDDEN), random(VOCAB, HIDDEN, scale=0.02)
    product, operations = matmul()
    out: list[Row] = []
    for fraction in fractions:
        labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
        labels[torch.rand(TOKENS, device="cuda") >= fraction] = -100
        kept = int((labels >= 0).sum())
        denominator = torch.tensor(float(kept), device="cuda")

        def ours(h, w, y, denominator=denominator, kept=kept):
            return eagle_kernels.linear_cross_entropy(h, w, y, denominator=denominator, num_kept=kept)

        def both(function: Callable, labels=labels) -> Callable[[], object]:
            return lambda: torch.autograd.grad(function(hidden, weight, labels), (hidden, weight))

        label = f"linear + cross-entropy, {fraction:.0%} labelled"
        contenders = ready({"ours": ours} | rivals.heads(), failures, label, lambda function: both(function)())
        runs = {name: both(function) for name, function in contenders.items()}
        times = interleaved_ms(runs, rounds=7, batch=60.0)
        # The clock sinks under load: the roof is the rate of plain products in turn with ours, equally long, at the same temperature.
        pair = interleaved_ms({"ours": runs["ours"], "8192^3": product}, rounds=5, batch=max(60.0, times["ours"]), most=400)
        rate = operations / pair["8192^3"]
        found = rows(label, times, 6.0 * kept * VOCAB * HIDDEN / rate)
        found[0]["of_roof"] = 6.0 * kept * VOCAB * HIDDEN / rate / pair["ours"]
        for row in found:
            peak = peak_extra_bytes(runs[row["contender"]])
            row["matmul_tflops_of_run"] = rate / 1e9
            row["peak_extra_gib"] = peak / 2**30
            row["peak_extra_beyond_fp32_weight_gradient_gib"] = (peak - 4.0 * VOCAB * HIDDEN) / 2**30
        out += found
    return out


GROUPS = {"norms": norms, "rope": rope, "swiglu": swiglu, "gelu": gelu, "head": head}
