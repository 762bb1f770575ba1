"""A SigLIP tower and a language model of 8B shapes, with random weights, taken through every command from YAML files alone.

    python packages/eagle-train/benchmarks/pretrained.py [--way full lora] [--small] [--folder DIR] [--out FILE.json]

`parts` writes both folders as their makers do (sharded safetensors in bfloat16, a tokenizer of the language model), `init` the
configuration, whose sources and stages are filled in. `full` trains the connector, then all parts with 8-bit AdamW and bfloat16 weights;
`lora` trains adapters of the language model. Each run is planned, trained, evaluated and exported; the exported folder is loaded by plain
transformers, where it answers as the run does, and the adapter by PEFT. `--small`: the same with small parts, for a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report, write
from eagle_model.presets import PRESETS
from eagle_train.training.metrics import Metrics

GIB = 1 << 30
LIBRARIES = ("torch", "transformers", "triton", "flash-attn-4", "torchao", "peft")
METRICS = {
    "seconds": Metric("s, whole command", "lower"),
    "first_step_s": Metric("s after the start", "lower"),
    "tokens_per_s": Metric("best step", "higher"),
    "peak_gib": Metric("GiB reserved", "lower"),
    "planned_gib": Metric("GiB", "none"),
    "first_loss": Metric("", "none"),
    "last_loss": Metric("", "none"),
    "difference": Metric("of the largest logit", "lower"),
}
SMALL_VISION = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64}
SMALL_TEXT = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass
class Walk:
    """The commands of one way, in `folder`; a case of `result` for each."""

    folder: Path
    result: Result
    way: str
    out: Path | None

    def eagle(self, *arguments: str) -> str:
        """Run a verb; its output. Raises RuntimeError with the end of it when the command fails."""
        begin = time.monotonic()
        command = [sys.executable, "-m", "eagle_train.cli", *arguments]
        with (self.folder / f"{self.way}-{arguments[0]}.log").open("w+") as log:
            code = subprocess.run(command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT).returncode
            log.seek(0)
            output = log.read()
        if code:
            raise RuntimeError(f"eagle {' '.join(arguments)}: exit code {code}\n{output[-3000:]}")
        options = " ".join(
            argument for argument in arguments[1:] if argument.startswith("--") and argument not in ("--vision", "--language")
        )
        self.add(f"eagle {arguments[0]} {options}".strip(), seconds=time.monotonic() - begin)
        return output

    def add(self, name: str, *, details: dict[str, Any] | None = None, **metrics: float) -> None:
        self.result.add(f"{self.way}: {name}", details=details or {}, **metrics)
        print(f"{self.way}: {name}", {key: round(value, 4) for key, value in metrics.items()}, flush=True)
        if self.out is not None:
            write(self.result, self.out)

    def trained(self, run: str, begin: float) -> None:
        """What the metrics of a run say."""
        records = [record for record in Metrics(self.folder / "runs" / run / "metrics.jsonl") if record["kind"] == "step"]
        for stage in dict.fromkeys(record["stage"] for record in records):
            steps = [record for record in records if record["stage"] == stage]
            planned = {"planned_gib": steps[-1]["memory_planned"] / GIB} if "memory_planned" in steps[-1] else {}
            self.add(
                f"stage {stage}, {len(steps)} steps of {steps[-1]['tokens']} tokens",
                details={"seconds": [record["seconds"] for record in steps], "losses": [record["loss"] for record in steps]},
                tokens_per_s=max(record["tokens_per_second"] for record in steps),
                peak_gib=steps[-1]["memory_peak"] / GIB,
                first_loss=steps[0]["loss"],
                last_loss=steps[-1]["loss"],
                **planned,
            )


def make_parts(folder: Path, small: bool) -> None:
    """parts/siglip, parts/language, rows.jsonl and held_out.jsonl."""
    import easy_vqa
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    from eagle_model.tokenizer import train_tokenizer

    torch.manual_seed(0)
    sizes = {key: value for key, value in PRESETS["8b"]["text_config"].items() if key != "architectures"}
    vision = PRESETS["8b"]["vision_config"]
    if small:
        sizes, vision = sizes | SMALL_TEXT | {"vocab_size": 1024}, SMALL_VISION | {"patch_size": 8}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            SiglipVisionModel(SiglipVisionConfig(**vision)).save_pretrained(folder / "parts/siglip")
            Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder / "parts/language", max_shard_size="4GB")
    finally:
        torch.set_default_dtype(torch.float32)
        if device == "cuda":
            torch.cuda.empty_cache()
    texts = []
    for split, name, count in (("train", "rows.jsonl", 600), ("test", "held_out.jsonl", 16)):
        paths, rows = getattr(easy_vqa, f"get_{split}_image_paths")(), {}
        for question, answer, image in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
            rows.setdefault(image, []).append({"from": "human", "value": question})
            rows[image].append({"from": "gpt", "value": answer})
        with (folder / name).open("w") as file:
            for image in sorted(rows)[:count]:
                texts += [turn["value"] for turn in rows[image]]
                rows[image][0]["value"] = "<image>" + rows[image][0]["value"]
                file.write(json.dumps({"image": str(paths[image]), "conversations": rows[image][:8]}) + "\n")
    train_tokenizer(texts, vocab_size=512).save_pretrained(folder / "parts/language")


def configure(folder: Path, way: str, options: argparse.Namespace) -> str:
    """The configuration that `eagle init` writes, with sources and stages filled in; its name."""
    name = f"{way}.yaml"
    content = yaml.safe_load((folder / "first.yaml").read_text())
    content["run"] = {"name": way, "log_every": 1}
    content["data"] = {"sources": {"shapes": {"annotation": "rows.jsonl"}}, "eval_sources": {"held": {"annotation": "held_out.jsonl"}}}
    content["eval"] = {"max_new_tokens": 4}
    content["checkpoint"] = {"every": 100, "keep": 1}
    stage = {"max_tokens": options.max_tokens, "packs_per_step": 1, "steps": options.steps}
    if way == "full":
        content["model"]["weights"] = "bfloat16"
        content["stages"] = [
            *([] if options.quick else [{"name": "warmup", **stage, "steps": 2, "train": ["connector"], "lr": 2.0e-4}]),
            {"name": "all", **stage, "optimizer": "adamw8bit" if find_spec("torchao") else "adamw", "lr": 2.0e-5},
        ]
    else:
        content["model"]["lora"] = {"language": {"rank": 16, "alpha": 32}}
        content["stages"] = [{"name": "adapters", **stage, "train": ["connector"], "parts": {"language": {"train": "lora", "lr": 1.0e-3}}}]
    if options.small:
        content["parallel"] = {"dtype": "bfloat16"}
    (folder / name).write_text(yaml.safe_dump(content))
    return name


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """Of plain transformers, for a question about the first held-out image."""
    import easy_vqa
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import eagle_model

    eagle_model.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placed = {"device_map": device} if device == "cuda" else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, **placed).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": easy_vqa.get_test_image_paths()[0]}, {"type": "text", "text": "What color is the shape?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(device)
    found = model(**inputs).logits[0, -1].float().cpu()
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def walk(folder: Path, way: str, result: Result, options: argparse.Namespace) -> None:
    commands = Walk(folder, result, way, options.out)
    name = configure(folder, way, options)
    gpus = ["--gpus", "1"] if torch.cuda.is_available() else []
    if not options.quick:
        commands.eagle("prepare", name)
        print(commands.eagle("plan", name, *gpus)[-1500:])
    begin = time.monotonic()
    commands.eagle("train", name)
    commands.trained(way, begin)
    if not options.quick:
        print(commands.eagle("eval", f"runs/{way}")[-600:])
    commands.eagle("export", f"runs/{way}", f"{way}-model")
    begin = time.monotonic()
    merged = logits(folder / f"{way}-model")
    assert torch.isfinite(merged).all()
    commands.add("plain transformers: load and one forward pass", seconds=time.monotonic() - begin)
    if way == "lora":
        commands.eagle("export", f"runs/{way}", "adapter", "--adapter")
        base = folder / "adapter/base"
        adapted = logits(base, folder / "adapter")
        difference = ((adapted - merged).abs().max() / merged.abs().max()).item()
        without = ((logits(base) - merged).abs().max() / merged.abs().max()).item()
        commands.add("adapter in PEFT against merged weights (bfloat16)", details={"without_adapter": without}, difference=difference)
    shutil.rmtree(folder / "runs" / way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--quick", action="store_true", help="without warm-up of the connector, `plan` and `eval`; training evaluates")
    parser.add_argument("--folder", type=Path, help="where models and runs are written (default: a temporary folder); about 80 GB")
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=8)
    add_out(parser)
    options = parser.parse_args()
    gpus = int(torch.cuda.is_available())
    settings = {"way": options.way, "small": options.small, "max_tokens": options.max_tokens, "steps": options.steps}
    result = Result("eagle-train/pretrained", environment(LIBRARIES, gpus=gpus), METRICS, settings=settings)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        begin = time.monotonic()
        make_parts(folder, options.small)
        Walk(folder, result, "parts", options.out).add("both folders written", seconds=time.monotonic() - begin)
        Walk(folder, result, "init", options.out).eagle("init", "--vision", "parts/siglip", "--language", "parts/language", "first.yaml")
        for way in options.way:
            try:
                walk(folder, way, result, options)
            except Exception as error:
                print(f"{way}: {error}", flush=True)
                result.settings[f"{way} failed"] = str(error)[-500:]
    report(result, options.out)
    if any(name.endswith("failed") for name in result.settings):
        sys.exit(1)


if __name__ == "__main__":
    main()
