"""Everything that is measured on a whole host, by one command: correctness, attention, steps, scaling, trees, the longest
context, kills.

    python packages/eagle-train/benchmarks/host.py --out DIR [--gpus N] [--only PART ...] [--minutes M]
    python packages/eagle-train/benchmarks/host.py --out DIR --small [--gpus 8]

N is all GPUs of the host by default; the parts are the same for any number. Each is a command of its own with a time limit, and its results
are in DIR as it goes: PART.json and .md (benchmarks/README.md), the output as PART.txt, bars as PART.png where matplotlib is installed.
`status.json` says after every part how it ended, and DIR/README.md sums up (`host_summary.py`). A part that fails or runs out of time does
not stop the others; with the same DIR, parts that have ended well are not repeated. Exits with 1 when a part failed. `--list` prints the
parts and their commands. `--small`: a CPU with gloo and tiny models, which shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from host_summary import page
from parts import NOT_STARTED, ROOT, Part, run

CP, TRAIN = "packages/eagle-cp/benchmarks", "packages/eagle-train/benchmarks"


@dataclass
class Host:
    """What the parts depend on."""

    gpus: int
    small: bool
    out: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ranks(self, script: str, *options: str, ranks: int = 0) -> list[str]:
        """A command over several ranks."""
        count = ["--standalone", f"--nproc-per-node={ranks or self.gpus}"]
        return [sys.executable, "-m", "torch.distributed.run", *count, script, *options, *self._small()]

    def alone(self, script: str, *options: str) -> list[str]:
        return [sys.executable, script, *options, *self._small()]

    def _small(self) -> list[str]:
        return ["--small"] if self.small else []


def parts(host: Host) -> list[Part]:
    """In the order of their worth per minute."""
    bench, step = f"{CP}/bench.py", f"{TRAIN}/context_step.py"
    found = [Part("check", host.ranks(f"{CP}/check.py"), 400)]
    for size, seconds in (("64K", 600), ("128K", 600), ("256K", 600), ("512K", 600), ("1M", 1200)):
        options = ["--tokens", size, "--seconds", "0" if host.small else "0.5", "--until", str(seconds * 2 // 3)]
        found.append(Part(f"attention-{size}", host.ranks(bench, *options), seconds, "both_tflops"))
    # By arithmetic a step of 1M tokens takes minutes on eight H100.
    for size, seconds, splits, rounds in (
        ("128K", 600, "all", 2),
        ("256K", 600, "all", 2),
        ("512K", 900, "all", 1),
        ("1M", 1200, "chosen", 1),
    ):
        options = ["--tokens", size, "--splits", splits, "--rounds", str(rounds), "--profile"]
        found.append(Part(f"step-{size}", host.ranks(step, *options), seconds, "mfu"))
    counts = [n for n in (1, 2, 4) if n < host.gpus] + [host.gpus]
    for count in counts:
        cases = ["one-32k"] if count == 1 else ["data-32k", "context-128k"]
        if count == 4:
            cases.append("limited-128k")  # whose plan needs four
        found.append(
            Part(f"scaling-{count}", host.alone(f"{TRAIN}/scaling.py", "--gpus", str(count), "--only", *cases), 500, "tokens_per_s")
        )
    trees = ["--trees", "--tokens", "128K", "--seconds", "0" if host.small else "0.5", "--until", "200"]
    found.append(Part("trees", host.ranks(bench, *trees), 300, "both_tflops"))
    found.append(Part("kills", kills(host), 3000, "ended_s"))
    return found


def kills(host: Host) -> list[str]:
    options = ["--ranks", str(host.gpus), "--until", "1800"]
    options += ["--device", "cpu", "--steps", "16", "--kills", "2"] if host.small else ["--size", "8b", "--kills", "12"]
    return [sys.executable, f"{TRAIN}/kills/run.py", *options]


def longest(host: Host, seconds: float, start: int = 1 << 20, trial: Callable[[int, float], bool] | None = None) -> dict[str, Any]:
    """The longest sequence that one step trains: doubled until it fails, then halved intervals to an eighth of the last that did.

    Every length is a process of its own, so that one that runs out of memory costs nothing. Inputs of layers wait in host memory.
    """
    begin, tried = time.monotonic(), {}

    def trains(tokens: int) -> bool:
        if tokens not in tried:
            left = seconds - (time.monotonic() - begin)
            if left < 30:
                raise TimeoutError
            tried[tokens] = (trial or _trial(host))(tokens, left)
            print(f"longest: {tokens >> 10}K {'trains' if tried[tokens] else 'does not train'}", flush=True)
        return tried[tokens]

    best, complete = 0, True
    try:
        size = start
        while not trains(size) and size > 32768:
            size //= 2
        while trains(size):
            best, size = size, 2 * size
        low, high = best, size
        while best and high - low > max(best // 8, 4096):
            middle = (low + high) // 2 // 4096 * 4096
            if trains(middle):
                low = best = middle
            else:
                high = middle
    except TimeoutError:
        complete = False
    return {"tokens": best, "complete": complete, "tried": {f"{tokens >> 10}K": ok for tokens, ok in sorted(tried.items())}}


def _trial(host: Host) -> Callable[[int, float], bool]:
    def trial(tokens: int, seconds: float) -> bool:
        options = ["--tokens", str(tokens), "--rounds", "1", "--activations", "recompute" if host.small else "offload"]
        part = Part(f"longest-{tokens >> 10}K", host.ranks(f"{TRAIN}/context_step.py", *options), seconds)
        return run(part, host.out, min(seconds, 60 if host.small else 1500))["exit_code"] == 0

    return trial


def plot(host: Host, part: Part) -> None:
    """Bars, if the part has figures; without matplotlib there are none."""
    result = host.out / f"{part.name}.json"
    if part.metric and result.is_file():
        command = [sys.executable, "-m", "benchmarks.plot", str(result), part.metric]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def record(host: Host, name: str, status: dict[str, Any]) -> None:
    """Write how a part ended."""
    host.done[name] = status
    (host.out / "status.json").write_text(json.dumps({"gpus": host.gpus, "small": host.small, "parts": host.done}, indent=1) + "\n")
    (host.out / "README.md").write_text(page(host.out, host.done))
    print(f"{name}: {status['ended']}, {status['seconds']} s", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results; made if need be")
    parser.add_argument("--gpus", type=int, help="how many (default: all; 8 processes with --small)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="names of parts, or beginnings of them: attention, step-1M")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no part runs later than so many minutes after the start")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true", help="print parts and commands, and run nothing")
    options = parser.parse_args()
    if options.gpus is None:
        import torch

        options.gpus = 8 if options.small else torch.cuda.device_count()
    if options.gpus < 1:
        parser.error("no CUDA device is available; --small runs on a CPU")
    return options


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the running part is ended too
    host = Host(options.gpus, options.small, options.out.resolve())
    todo = [part for part in parts(host) if options.only is None or part.name.startswith(tuple(options.only))]
    search = options.only is None or "longest".startswith(tuple(options.only))
    if options.list:
        for part in todo:
            print(f"{part.name} ({part.seconds:.0f} s): {shlex.join(part.command)}")
        return
    if not todo and not search:
        sys.exit(f"--only {' '.join(options.only)}: no such part; parts are {', '.join(part.name for part in parts(host))}, longest")
    host.out.mkdir(parents=True, exist_ok=True)
    status = host.out / "status.json"
    if status.is_file():
        earlier = json.loads(status.read_text())
        if (earlier["gpus"], earlier["small"]) != (host.gpus, host.small):
            sys.exit(f"{status} is of {earlier['gpus']} GPUs{', --small' if earlier['small'] else ''}; choose another --out")
        host.done = earlier["parts"]
    begin, limit = time.monotonic(), 60 * options.minutes
    for part in todo:
        left = limit - (time.monotonic() - begin)
        if host.done.get(part.name, {}).get("ended") == "complete":
            continue
        if left < 30:
            record(host, part.name, {"ended": "not started: the time was up"} | NOT_STARTED)
            continue
        record(host, part.name, run(part, host.out, min(part.seconds, left)))
        plot(host, part)
    left = limit - (time.monotonic() - begin)
    if search and host.done.get("longest", {}).get("ended") != "complete" and left > 30:
        found = longest(host, min(left, 3600.0), start=(1 << 18) if host.small else (1 << 20))
        ended = "complete" if found["complete"] and found["tokens"] else "no length trained" if found["complete"] else "the time was up"
        record(host, "longest", {"ended": ended, "exit_code": None, "seconds": round(time.monotonic() - begin, 1)} | found)
    sys.exit(0 if all(found["ended"] == "complete" for found in host.done.values()) else 1)


if __name__ == "__main__":
    main()
