"""Benchmarks of training on one GPU, and the tests that need one: parts run side by side, each on a GPU of its own.

    python packages/eagle-train/benchmarks/one_gpu.py --out DIR [--only PART ...] [--minutes M] [--list] [--small]

Every GPU of the host takes, in the order of `--list`, the next part whose memory it has and that ends in the time that is left. Output and
result of a part are in DIR: PART.txt, and PART.json, PART.xml (tests) or the folder PART; `status.json` says how each ended. With the same
DIR, parts that have ended well are not repeated, and `science` continues. Exits with 1 when a part failed or was not started. `--small`:
those parts that have tiny sizes, on a CPU, to see that they run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from parts import NOT_STARTED, Part, Running

CP, TRAIN = "packages/eagle-cp/benchmarks", "packages/eagle-train/benchmarks"
TESTED = ("kernels", "cp", "model", "train", "tiling")


class Gpu(NamedTuple):
    """name: as CUDA_VISIBLE_DEVICES has it."""

    name: str
    gib: float


def parts(small: bool) -> list[Part]:
    """In the order in which they start: the longest first, so that GPUs end together."""

    def script(path: str, *options: str) -> list[str]:
        return [sys.executable, path, *options, *(["--small"] if small else [])]

    def alone(path: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", *script(path, *options)[1:]]

    def step(case: str, *options: str) -> list[str]:
        return script(f"{TRAIN}/step.py", "--only", case, *options)

    science = [sys.executable, f"{TRAIN}/science/run.py", *(["--trial"] if small else ["--size", "large", "--deadline", "560"])]
    trees = ["--trees", "--tokens", "128K", "--seconds", "0" if small else "0.5", "--until", "150"]
    found = [
        Part("one-512k", script(f"{TRAIN}/scaling.py", "--only", "one-512k"), 590, gib=100),
        Part("science-fill", [*science, "--only", "fill"], 580, gib=70, result=("--out", "")),
        Part("science-text", [*science, "--only", "text"], 580, gib=70, result=("--out", "")),
        Part("questions", step("questions", "--rival"), 250, gib=130),
        Part("save", script(f"{TRAIN}/scaling.py", "--gpus", "1", "--only", "data-32k"), 240, gib=100),
        Part("nemo-32k", step("32k", "--policies", "selective", "--rival", "liger", "nemo-full", "nemo-selective"), 240, gib=130),
        Part("fp8-128k", step("128k", "--policies", "recompute", "selective", "--rounds", "1", "--fp8", "rowwise"), 300, gib=130),
        Part("step-64k", step("64k", "--policies", "selective", "lean"), 150, gib=130),
        Part("trees", alone(f"{CP}/bench.py", *trees), 240, "both_tflops", gib=40),
        Part("optimizers", script(f"{TRAIN}/optimizers.py"), 120, gib=20),
        Part("quickstart", [sys.executable, "-m", "eagle_train.cli", "train", "quickstart"], 300, gib=10, result=("--dir", "")),
    ]
    for folder in TESTED:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu" if small else "gpu", f"tests/{folder}"]
        found.append(Part(f"tests-{folder}", command, 240, gib=40, result=("--junitxml", ".xml")))
    if small:  # the others are sizes of the 8B or tests, which run without this script
        return [part for part in found if part.name in ("science-fill", "questions", "save", "trees", "optimizers")]
    return found


class Queue:
    """The parts that wait, and how the others ended."""

    def __init__(self, parts: list[Part], out: Path, seconds: float) -> None:
        self.out, self.status, self.end = out, out / "status.json", time.monotonic() + seconds
        self.done: dict[str, dict[str, Any]] = json.loads(self.status.read_text()) if self.status.is_file() else {}
        self.waiting = [part for part in parts if self.done.get(part.name, {}).get("ended") != "complete"]

    def go(self, gpus: list[Gpu]) -> None:
        """Until no part can start. What can't is recorded, too."""
        cores = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // len(gpus)))}
        running: dict[Gpu, Running] = {}
        try:
            while True:
                for gpu in gpus:
                    if gpu not in running and (part := self._take(gpu)) is not None:
                        running[gpu] = Running(part, self.out, part.seconds, cores | {"CUDA_VISIBLE_DEVICES": gpu.name})
                if not running:
                    break
                for gpu, one in list(running.items()):
                    if (status := one.status(patience=0.1)) is not None:
                        del running[gpu]
                        self._record(one.part.name, status)
        finally:
            for one in running.values():
                one.end()
        for part in self.waiting:
            room = any(gpu.gib >= part.gib for gpu in gpus)
            why = f"its {part.seconds:.0f} s did not fit in the time" if room else f"no GPU has {part.gib:.0f} GiB"
            self._record(part.name, {"ended": f"not started: {why}"} | NOT_STARTED)

    def _take(self, gpu: Gpu) -> Part | None:
        left = self.end - time.monotonic()
        part = next((part for part in self.waiting if part.gib <= gpu.gib and part.seconds <= left), None)
        if part is not None:
            self.waiting.remove(part)
        return part

    def _record(self, name: str, status: dict[str, Any]) -> None:
        self.done[name] = status
        self.status.write_text(json.dumps(self.done, indent=1) + "\n")
        print(f"{name}: {status['ended']}, {status['seconds']} s", flush=True)


def gpus() -> list[Gpu]:
    """Of this process."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(torch.cuda.device_count())] if given is None else given.split(",")
    return [Gpu(name, torch.cuda.get_device_properties(number).total_memory / 2**30) for number, name in enumerate(names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results; made if need be")
    parser.add_argument("--only", nargs="+", metavar="PART", help="names of parts, or beginnings of them: tests, step-64k")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="all parts end within so many minutes")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true", help="print parts and commands, and run nothing")
    options = parser.parse_args()
    todo = [part for part in parts(options.small) if options.only is None or part.name.startswith(tuple(options.only))]
    if not todo:
        names = ", ".join(part.name for part in parts(options.small))
        sys.exit(f"--only {' '.join(options.only)}: no such part; parts are {names}")
    if options.list:
        for part in todo:
            print(f"{part.name} ({part.seconds:.0f} s, {part.gib:.0f} GiB): {shlex.join(part.command)}")
        return
    found = [Gpu("", float("inf"))] if options.small else gpus()
    if not found:
        sys.exit("no CUDA device is available; --small runs some parts on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    queue = Queue(todo, out, 60 * options.minutes)
    queue.go(found)
    sys.exit(0 if all(queue.done[part.name]["ended"] == "complete" for part in todo) else 1)


if __name__ == "__main__":
    main()
