"""A training step (forward and backward, no optimizer) of a decoder at 8B shapes: the cost of offload, and the accuracy of `plan_memory`.

python packages/eagle-kernels/benchmarks/step.py [--out FILE.json]
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.cuda import batch_ms, ceilings
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_kernels import (
    DecoderShape,
    LinearCrossEntropy,
    OffloadEngine,
    RMSNorm,
    SwiGLUMLP,
    offload_checkpoint,
    plan_memory,
    rope,
)
from eagle_kernels.offload import ATTENTION_OPERATORS

GIB = 1 << 30
METRICS = {
    "ms": Metric("ms", "lower"),
    "over_gpu": Metric("", "none"),
    "peak_gib": Metric("GiB", "lower"),
    "planned_gib": Metric("GiB", "none"),
    "plan_error": Metric("", "none"),
    "planned_host_gib": Metric("GiB", "none"),
    "loss": Metric("", "none"),
}
BACKENDS = [nn.attention.SDPBackend.CUDNN_ATTENTION, nn.attention.SDPBackend.FLASH_ATTENTION]


def shape_of(layers: int) -> DecoderShape:
    return DecoderShape(hidden=3584, intermediate=18944, layers=layers, heads=28, kv_heads=4, head_dim=128, vocab=152064)


class Layer(nn.Module):
    def __init__(self, shape: DecoderShape, rows: int | None) -> None:
        super().__init__()
        self.shape = shape
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.norm1, self.norm2 = RMSNorm(shape.hidden, **options), RMSNorm(shape.hidden, **options)
        self.qkv = nn.Linear(shape.hidden, width, **options)
        self.out = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False, **options)
        self.mlp = SwiGLUMLP(shape.hidden, shape.intermediate, rows=rows, **options)

    def forward(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        s = self.shape
        q, k, v = self.qkv(self.norm1(x)).view(-1, s.heads + 2 * s.kv_heads, s.head_dim).split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        q, k = rope(q, k, positions, inv_freq)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v.contiguous()))
        with nn.attention.sdpa_kernel(BACKENDS, set_priority=True):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        normed, x = self.norm2(self.out(mixed[0].transpose(0, 1).reshape(-1, s.heads * s.head_dim)), x)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    def __init__(self, shape: DecoderShape, rows: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden, device="cuda", dtype=torch.bfloat16)
        self.layers = nn.ModuleList(Layer(shape, rows) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, device="cuda", dtype=torch.bfloat16)
        self.head = LinearCrossEntropy(shape.hidden, shape.vocab, device="cuda", dtype=torch.bfloat16)
        exponent = -torch.arange(0, shape.head_dim, 2, device="cuda", dtype=torch.float32) / shape.head_dim
        self.inv_freq = 1e6**exponent

    def forward(self, ids: Tensor, labels: Tensor, denominator: Tensor, engine: OffloadEngine | None) -> Tensor:
        positions = torch.arange(ids.shape[0], device=ids.device)
        x = self.embedding(ids)
        for layer in self.layers:
            x = offload_checkpoint(lambda x, layer=layer: layer(x, positions, self.inv_freq), x, engine=engine)
        return self.head(self.norm(x), labels, denominator=denominator, num_kept=labels.shape[0])


def measure(result: Result, tokens: int, layers: int, rows: int | None, repeats: int) -> None:
    """One case per policy, in turn: inputs of layers on the GPU, on the host, on the host with attention outputs."""
    shape = shape_of(layers)
    model = Decoder(shape, rows)
    ids = torch.randint(0, shape.vocab, (tokens,), device="cuda")
    denominator = torch.tensor(float(tokens), device="cuda")
    state = tokens * shape.hidden * 2
    with_attention = 2 * state + 4 * tokens * shape.heads
    policies: dict[str, tuple[OffloadEngine | None, dict[str, Any]]] = {
        "gpu": (None, {}),
        "host": (OffloadEngine((layers - 1) * state), {"offload": True}),
        "host + attention": (
            OffloadEngine((layers - 1) * with_attention + (1 << 20), keep_operators=ATTENTION_OPERATORS),
            {"offload": True, "keep_attention": True},
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in policies}
    peaks: dict[str, int] = {}
    losses: dict[str, float] = {}
    for _ in range(repeats + 1):
        for name, (engine, _options) in policies.items():
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            out: list[Tensor] = []

            def step(engine=engine, out=out) -> None:
                out.append(model(ids, ids, denominator, engine))
                out[0].backward()

            times[name].append(batch_ms(step, 1))
            peaks[name] = torch.cuda.max_memory_allocated()
            losses[name] = out[0].item()
    on_gpu = statistics.median(times["gpu"][1:])
    for name, (_, options) in policies.items():
        plan = plan_memory(shape, tokens, mlp_rows=rows, **options)
        ms = statistics.median(times[name][1:])
        result.add(
            f"{tokens} tokens, {layers} layers, MLP rows {rows or 'all'}, layer inputs on {name}",
            details={"planned_moment": plan.moment, "all_ms": times[name]},
            ms=ms, over_gpu=ms / on_gpu - 1, peak_gib=peaks[name] / GIB, planned_gib=plan.gpu / GIB, plan_error=plan.gpu / peaks[name] - 1,
            planned_host_gib=plan.host / GIB, loss=losses[name],
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    result = Result("eagle-kernels/step", environment(("torch", "triton")), METRICS, ceilings=ceilings())
    for tokens, layers, mlp_rows, repeats in ((32768, 8, None, 5), (32768, 8, 8192, 3), (131072, 4, 16384, 2)):
        measure(result, tokens, layers, mlp_rows, repeats)
        torch.cuda.empty_cache()
    report(result, options.out)


if __name__ == "__main__":
    main()
