"""Time that checkpoints take from training, on the CPU: steps without any, with checkpoints that steps wait for, and in the background.

    OMP_NUM_THREADS=1 python checkpoints.py --out results/checkpoints.json

A step is forward and backward of linear layers and AdamW; `--width` and `--layers` set the size. A checkpoint follows every `--every`
steps. The figure is the time of all steps and of the saves between them (the end of the last write included) over that of the steps
alone, contenders in turn. Training and the writing thread share `--threads` cores here; on a GPU training leaves the CPU to the writer.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from eagle_train.distributed.world import alone
from eagle_train.training.checkpoint import Progress
from eagle_train.training.saving import Saver


class Net(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def run(options: argparse.Namespace, folder: Path, background: bool | None) -> dict[str, float]:
    torch.manual_seed(0)
    model = Net(options.width, options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(options.batch, options.width)
    saver = Saver(folder, alone("cpu"), keep=1, background=bool(background))
    blocked = 0.0
    begin = time.monotonic()
    for step in range(1, options.steps + 1):
        model.layers(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if background is not None and step % options.every == 0:
            before = time.monotonic()
            saver.save(Progress(0, "one", step, step, False, {}), model, optimizer)
            blocked += time.monotonic() - before
    saver.wait()
    seconds = time.monotonic() - begin
    saver.close()
    return {"seconds": seconds, "blocked": blocked, "gigabytes": 12 * sum(p.numel() for p in model.parameters()) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 2048), ("layers", 4), ("batch", 2048), ("steps", 20), ("every", 10), ("repeats", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contenders = {"none": None, "waiting": False, "background": True}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, background in contenders.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(run(options, Path(folder), background))
            print(name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)
    middle = {name: {key: statistics.median(one[key] for one in some) for key in some[0]} for name, some in found.items()}
    result = {
        "machine": {"torch": torch.__version__, "cpus": os.cpu_count(), "load": os.getloadavg()[0], "date": time.strftime("%F")},
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "median": middle,
        "lost": {name: middle[name]["seconds"] / middle["none"]["seconds"] - 1 for name in ("waiting", "background")},
    }
    print(json.dumps(result["lost"]))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
