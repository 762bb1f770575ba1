"""Start-up of a run on the CPU over gloo: seconds and host memory until every rank holds its weights.

    python startup.py --ranks 2 --preset 1b --out results/startup.json

Contenders, each in processes of its own: `whole`, where every rank makes the whole float32 model and then shards it (Eagle before
0.2), and `shards`, where the model is made on the meta device, sharded, and filled. Origins: random weights, and a folder of bfloat16
safetensors, which is written first. Host memory is the peak of a rank's anonymous memory (RssAnon, sampled every 10 ms): pages of a
mapped file, which the system takes back when it needs them, are reported apart (peak of RssFile).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GIB = 2**30


class Memory:
    """Peaks of a process's anonymous and file-backed resident memory, in bytes."""

    def __init__(self) -> None:
        self.anonymous = self.file = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(fields["RssAnon"].split()[0]) * 1024)
            self.file = max(self.file, int(fields["RssFile"].split()[0]) * 1024)
            if self._over.wait(0.01):
                return


def configuration(origin: str, preset: str, tokenizer: str):
    from eagle_train.config import parse_config

    model = {"preset": preset, "tokenizer": tokenizer} if origin == "random" else {"path": origin}
    return parse_config({"model": model, "parallel": {"dtype": "float32"}, "stages": [{"name": "one", "max_tokens": 4096}]})


def child(contender: str, origin: str, preset: str, tokenizer: str) -> None:
    """One rank: prints a line of JSON."""
    import torch
    from torch import nn
    from transformers.initialization import no_init_weights

    from eagle_model.checkpoint import load_checkpoint
    from eagle_model.eagle import EagleForConditionalGeneration
    from eagle_train.distributed.sharding import shard_model
    from eagle_train.distributed.world import start_world
    from eagle_train.training.build import empty_model, fill_model
    from eagle_train.training.model import load_run_tokenizer, model_config

    torch.set_num_threads(1)
    config = configuration(origin, preset, tokenizer)
    world = start_world(config.parallel, "cpu")
    tokens = load_run_tokenizer(config)
    model: nn.Module
    with Memory() as memory:
        before = memory.anonymous
        world.barrier()
        begin = time.monotonic()
        if contender == "whole":
            described = model_config(config, tokens)
            torch.manual_seed(0)
            if origin == "random":
                model = EagleForConditionalGeneration(described).float()
            else:
                with no_init_weights():
                    model = EagleForConditionalGeneration(described).float()
                model.tie_weights()
                load_checkpoint(model, Path(origin))
            model = shard_model(model, world, config.parallel)
        else:
            empty = empty_model(config, tokens)
            model = shard_model(empty.model, world, config.parallel)
            fill_model(model, empty.rows, world)
        world.barrier()
        seconds = time.monotonic() - begin
    shard = sum(p.to_local().numel() * 4 if hasattr(p, "to_local") else p.numel() * 4 for p in model.parameters())
    total = sum(p.full_tensor().double().sum().item() if world.size > 1 else p.double().sum().item() for p in list(model.parameters())[:40])
    print(
        json.dumps(
            {"rank": world.rank, "seconds": seconds, "before": before, "anonymous": memory.anonymous, "file": memory.file}
            | {"shard": shard, "checksum": total}
        ),
        flush=True,
    )
    world.close()


def measure(contender: str, origin: str, preset: str, tokenizer: str, ranks: int) -> dict:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    common["LOCAL_WORLD_SIZE"] = str(ranks)
    command = [sys.executable, __file__, "--child", contender, "--origin", origin, "--preset", preset, "--tokenizer", tokenizer]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    lines = [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in processes]
    worst = {key: max(line[key] for line in lines) for key in ("seconds", "anonymous", "file", "shard", "before")}
    return {"contender": contender, "origin": "random" if origin == "random" else "safetensors", "ranks": ranks, "preset": preset} | {
        "seconds": round(worst["seconds"], 2),
        "shard_gib": round(worst["shard"] / GIB, 3),
        "before_gib": round(worst["before"] / GIB, 3),
        "peak_gib": round(worst["anonymous"] / GIB, 3),
        "above_shard_gib": round((worst["anonymous"] - worst["shard"]) / GIB, 3),
        "file_gib": round(worst["file"] / GIB, 3),
        "checksum": lines[0]["checksum"],
    }


def write_start(folder: Path, preset: str, tokenizer: str) -> None:
    """A model of the preset in bfloat16 safetensors, of random weights."""
    import torch

    from eagle_model.checkpoint import save_checkpoint
    from eagle_train.training.build import build_model
    from eagle_train.training.model import load_run_tokenizer

    config = configuration("random", preset, tokenizer)
    tokens = load_run_tokenizer(config)
    model = build_model(config, tokens)
    save_checkpoint(model.state_dict(), model.config, folder, dtype=torch.bfloat16)
    tokens.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--origin")
    parser.add_argument("--tokenizer")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.origin, options.preset, options.tokenizer)
        return
    import torch

    from eagle_model.tokenizer import train_tokenizer

    results = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = str(Path(folder, "tokenizer"))
        train_tokenizer(["What is in this picture?"], vocab_size=400).save_pretrained(tokenizer)
        start = Path(folder, "start")
        write_start(start, options.preset, tokenizer)
        for ranks in options.ranks:
            for origin in ("random", str(start)):
                for _ in range(options.repeats):
                    for contender in ("whole", "shards"):
                        results.append(measure(contender, origin, options.preset, tokenizer, ranks))
                        print(json.dumps(results[-1]), flush=True)
    if options.out:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count(), "date": time.strftime("%F")}
        options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
