"""`generate` of the 8B model next to transformers' own InternVL of the same shapes: long prompts, first token, tokens a second, memory.

    python packages/eagle-model/benchmarks/generation.py [--only CASE ...] [--steps STEP ...] [--until SECONDS] [--out FILE.json] [--small]

The rival is `InternVLForConditionalGeneration` with a tower and a decoder of our sizes, 448-pixel tiles of 256 tokens and attention by
`sdpa`. Both have random bf16 weights, made on the GPU, and one contender is on it at a time. A figure is of one call of `generate`, after
a shorter one for warm-up; a streamer notes when tokens arrive, so the first token includes vision tower, prefill and choice of the token.
`decode_tokens_per_s` is of the median step, all rows together; `answer_s` is the whole call, 64 tokens.
`peak_gib` and `reserved_gib` are until then, weights and tiles included; `decode_peak_gib` is of the whole call.

Cases: `131k` (512 frames), `32k` (128 frames), `2k` (4 tiles and 1024 text tokens) and `2k-16` (the same in 16 rows). Ours has
`prefill_chunk_size=8192`; transformers has no prefill in chunks for prompts with images. Steps: `plain`, with a cache that grows; `graph`,
ours with a cache of fixed size and the decode step as a CUDA graph; `compiled`, with a cache of fixed size and transformers' default for
it, which is `torch.compile` with CUDA graphs, compiled in the warm-up.

`--until`: no case starts later than so many seconds after the start; what did not run is reported as absent. `--small`: sizes for a
trial run, also without a GPU.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.cuda import ceilings
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report, write
from benchmarks.rivals import Absent, Rival, load
from eagle_model import EagleForConditionalGeneration, preset

GIB = 1 << 30
LIBRARIES = ("torch", "triton", "transformers", "flash-attn-4")
METRICS = {
    "first_token_s": Metric("s", "lower"),
    "prompt_tokens_per_s": Metric("", "higher"),
    "decode_tokens_per_s": Metric("", "higher"),
    "answer_s": Metric("s", "lower"),
    "peak_gib": Metric("GiB", "lower"),
    "decode_peak_gib": Metric("GiB", "lower"),
    "reserved_gib": Metric("GiB", "lower"),
    "warmup_s": Metric("s", "none"),
    "faster_first_token": Metric("", "none"),
    "faster_decode": Metric("", "none"),
    "memory_ratio": Metric("", "none"),
}
CASES = ["131k", "32k", "2k", "2k-16"]
STEPS = ["plain", "graph", "compiled"]
RIVAL = "transformers InternVL"
IMAGE = 151665


@dataclass(frozen=True)
class Workload:
    """One call of `generate`. tiles and text: tiles and text tokens of a row; warm_tiles: tiles of a row in the warm-up; step: of STEPS."""

    case: str
    tiles: int
    text: int
    warm_tiles: int
    rows: int = 1
    new: int = 64
    step: str = "plain"

    def contender(self, name: str) -> str:
        return name if self.step == "plain" else f"{name}, {self.step}"


def workloads(small: bool) -> list[Workload]:
    """In the order in which a contender runs them."""
    if small:
        long, middle = Workload("131k", 40, 20, 10, new=6), Workload("32k", 16, 20, 10, new=6)
        short, batch = Workload("2k", 2, 20, 2, new=6), Workload("2k-16", 2, 20, 2, rows=3, new=6)
    else:
        long, middle = Workload("131k", 512, 64, 72), Workload("32k", 128, 64, 72)
        short, batch = Workload("2k", 4, 1024, 4), Workload("2k-16", 4, 1024, 4, rows=16)
    graphs = [replace(work, step="graph") for work in (short, batch, replace(long, warm_tiles=short.tiles))]
    return [long, middle, short, batch, *graphs, *(replace(work, step="compiled") for work in (short, batch))]


@dataclass
class Arrivals:
    """A streamer for `generate` that notes when tokens arrive, and the peaks of memory at the first one. It gets the prompt first."""

    times: list[float] = field(default_factory=list)
    peak: int = 0
    reserved: int = 0

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2 and torch.cuda.is_available():
            self.peak, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def end(self) -> None:
        pass


@contextmanager
def on_device(device: str, dtype: torch.dtype) -> Any:
    """Modules made here have their random weights made on `device` in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


class Contender:
    """A model on the device. options: of every `generate`; pixels: its input from uint8 tiles [N, s, s, 3]."""

    def __init__(self, model: Any, options: dict[str, Any], pixels: Callable[[Tensor], Tensor]) -> None:
        self.model, self.options, self.pixels = model.eval(), options, pixels
        model.generation_config.eos_token_id = None  # answers have one length
        model.generation_config.pad_token_id = 0


def ours(config: Any, chunk: int) -> Contender:
    model = EagleForConditionalGeneration(config)
    return Contender(model, {"prefill_chunk_size": chunk}, lambda tiles: tiles)


def internvl(kind: Any, configuration: Any, config: Any, _: int) -> Contender:
    """transformers' InternVL of the sizes of `config`."""
    vision, text = config.vision_config, config.text_config.to_dict()
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    sizes = {name: getattr(vision, name) for name in fields} | {"attention_bias": True}
    like = configuration(
        vision_config=sizes,
        text_config=text,
        image_token_id=config.image_token_index,
        image_seq_length=config.tokens_per_tile,
        downsample_ratio=config.downsample_ratio,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    like._attn_implementation = "sdpa"
    model = kind(like)

    def pixels(tiles: Tensor) -> Tensor:
        out = torch.empty(len(tiles), 3, *tiles.shape[1:3], dtype=model.dtype, device=tiles.device)
        for part, target in zip(tiles.split(16), out.split(16)):
            target.copy_(part.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return out

    return Contender(model, {}, pixels)


RIVALS = [
    Rival("ours", lambda: ours),
    Rival(
        RIVAL,
        lambda kind, configuration: lambda config, chunk: internvl(kind, configuration, config, chunk),
        ("transformers:InternVLForConditionalGeneration", "transformers:InternVLConfig"),
    ),
]


def prompt(contender: Contender, config: Any, work: Workload, tiles: int, device: str) -> dict[str, Tensor]:
    """Rows of visual tokens, then text."""
    size, visual = config.tile_size, tiles * config.tokens_per_tile
    generator = torch.Generator(device).manual_seed(0)
    top = min(150000, config.image_token_index)
    ids = torch.randint(0, top, (work.rows, visual + work.text), device=device, generator=generator)
    ids[:, :visual] = config.image_token_index
    shape = (work.rows * tiles, size, size, 3)
    images = torch.randint(0, 256, shape, device=device, dtype=torch.uint8, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": contender.pixels(images)}


def generate(contender: Contender, work: Workload, inputs: dict[str, Tensor], new: int) -> tuple[float, Arrivals]:
    """(the time of the call, arrivals of tokens)."""
    arrivals = Arrivals()
    options = dict(contender.options)
    if work.step != "plain":
        options["cache_implementation"] = "static"
    if work.step == "graph":
        options["compile_config"] = CompileConfig(backend="cudagraphs")
    start = time.perf_counter()
    out = contender.model.generate(**inputs, do_sample=False, max_new_tokens=new, streamer=arrivals, **options)
    assert out.shape == (work.rows, inputs["input_ids"].shape[1] + new), out.shape
    return start, arrivals


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run(result: Result, name: str, contender: Contender, config: Any, work: Workload, device: str) -> None:
    begin = time.perf_counter()
    # A compiled step is compiled again for a cache of another size, so its warm-up is the same call.
    generate(contender, work, prompt(contender, config, work, work.warm_tiles, device), work.new if work.step == "compiled" else 4)
    warmup = time.perf_counter() - begin
    free()
    inputs = prompt(contender, config, work, work.tiles, device)
    free()
    start, arrivals = generate(contender, work, inputs, work.new)
    tokens, first = inputs["input_ids"].numel(), arrivals.times[1] - start
    steps = [later - earlier for earlier, later in zip(arrivals.times[1:], arrivals.times[2:])]
    metrics = {
        "first_token_s": first, "prompt_tokens_per_s": tokens / first, "decode_tokens_per_s": work.rows / statistics.median(steps),
        "answer_s": arrivals.times[-1] - start, "warmup_s": warmup,
    }  # fmt: skip
    if device == "cuda":
        metrics |= {"peak_gib": arrivals.peak / GIB, "reserved_gib": arrivals.reserved / GIB}
        metrics["decode_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    details = {"prompt_tokens": tokens, "rows": work.rows, "step_ms": [round(step * 1e3, 3) for step in steps]}
    case = result.add(work.case, work.contender(name), details=details, **metrics)
    print(
        f"{work.case} {work.contender(name)}: {', '.join(f'{key} {value:.4g}' for key, value in case.metrics.items())}",
        file=sys.stderr,
        flush=True,
    )


def compare(result: Result) -> None:
    """Our cases get their ratios to the rival's best figure of the same case."""
    for case in result.cases:
        others = [other.metrics for other in result.cases if other.case == case.case and other.contender.startswith(RIVAL)]
        if not case.contender.startswith("ours") or not others:
            continue
        own = case.metrics
        own["faster_first_token"] = min(other["first_token_s"] for other in others) / own["first_token_s"]
        own["faster_decode"] = own["decode_tokens_per_s"] / max(other["decode_tokens_per_s"] for other in others)
        if "peak_gib" in own:
            own["memory_ratio"] = own["peak_gib"] / min(other["peak_gib"] for other in others)


def stages(names: Iterable[str], works: list[Workload]) -> list[tuple[str, list[Workload]]]:
    """Contenders with what they run, one model after the other. Compiling takes longest and comes last."""
    plain = [(name, [work for work in works if work.step == "plain"]) for name in names]
    return plain + [(name, [work for work in works if work.step == "compiled" or (work.step, name) == ("graph", "ours")]) for name in names]


def run_all(
    result: Result, name: str, make: Callable[..., Contender], config: Any, chunk: int, works: list[Workload], device: str, until: float,
    out: Path | None,
) -> None:  # fmt: skip
    """Make a contender and run its cases; the result is written after each. until: no case starts later (of `time.perf_counter`)."""
    contender: Contender | None = None
    for work in works:
        reason = None
        try:
            if time.perf_counter() > until:
                reason = "not started: --until"
            else:
                free()
                if contender is None:
                    begin = time.perf_counter()
                    with on_device(device, torch.bfloat16):
                        contender = make(config, chunk)
                    print(f"{name}: made in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
                with torch.no_grad():
                    run(result, name, contender, config, work, device)
                compare(result)
        except Exception as error:
            first = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {first[0][:300] if first else ''}"
            print(f"{work.case} {work.contender(name)}: {reason}", file=sys.stderr, flush=True)
        if reason is not None:
            result.absent.append(Absent(work.case, work.contender(name), reason))
        if out is not None:
            write(result, out)
    del contender
    torch._dynamo.reset()
    free()


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=CASES, choices=CASES, help="cases that run")
    parser.add_argument("--steps", nargs="*", default=STEPS, choices=STEPS, help="decode steps that run")
    parser.add_argument("--until", type=float, default=float("inf"), metavar="SECONDS", help="no case starts later than this")
    parser.add_argument("--small", action="store_true", help="small sizes, also without a GPU")
    add_out(parser)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        parser.error("no CUDA device is available; --small runs without one")
    if options.small:
        config, chunk = preset("tiny", image_token_index=500), 64
    else:
        config, chunk = preset("8b", image_token_index=IMAGE), 8192
    settings = {"only": options.only, "steps": options.steps, "small": options.small}
    result = Result("eagle-model/generation", environment(LIBRARIES), METRICS, settings=settings)
    if device == "cuda":
        result.ceilings = ceilings()
    found, absent = load("all", RIVALS)
    result.absent += absent
    for name, works in stages(found, workloads(options.small)):
        chosen = [work for work in works if work.case in options.only and work.step in options.steps]
        run_all(result, name, found[name], config, chunk, chosen, device, began + options.until, options.out)
    report(result, options.out)


if __name__ == "__main__":
    main()
