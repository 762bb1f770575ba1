"""`eagle train` of the 8B on one and several GPUs: start-up, tokens a second per GPU, memory against the plan, checkpoints.

    python packages/eagle-train/benchmarks/scaling.py [--only CASE ...] [--gpus N] [--until SECONDS] [--out FILE.json] [--small]

Rows are questions about one long video, which is generated, so that every pack is full of frames. Random weights (`preset: 8b`), one pack
per GPU and step, unless said otherwise:

- `one-32k`, `data-32k`: one GPU, and all of them with a pack each. bfloat16 weights and 8-bit AdamW, which one GPU can hold.
- `context-128k`: all GPUs share a pack of 131072 tokens (all-gather of keys and values), bfloat16 weights and 8-bit AdamW.
- `adamw-32k`: as `data-32k` with float32 weights and AdamW, which needs several GPUs.
- `limited-128k`: as `context-128k` with float32 weights and AdamW, in a plan of 58 GiB per GPU (four GPUs).
- `one-256k`, `one-512k`: one GPU, one sample of 262144 or 524288 tokens, bfloat16 weights and 8-bit AdamW; a single step. 512K keeps the
  inputs of decoder layers in host memory (94.5 GiB). They are killed after it, without the checkpoint.
- `sums-32k`: as `one-32k` with three packs a step, whose gradients are summed in float32.
- `one-2b-32k`: the 2B with float32 weights, AdamW, and two packs a step: FSDP2 on one rank.

`start_s` is from the start of the command until the record of the first step is in metrics.jsonl; its phases are listed, too. Rates are of
the median of the steps after the second, or of the last step of a shorter run. In `data-32k` a checkpoint is written in the background
after the ninth step: `checkpoint_s` is what the steps after it took longer than the median of those before, and `checkpoint_written_s` is
from the end of the ninth step until the checkpoint is complete; the run is killed after its last step, before it writes another 33 GB.
`--small`: tiny models on processes of a CPU, two by default.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report, write
from benchmarks.rivals import Absent
from eagle_train.training.checkpoint import latest
from eagle_train.training.metrics import Metrics

GIB = 1 << 30
LIBRARIES = ("torch", "transformers", "triton", "flash-attn-4", "torchao", "av")
METRICS = {
    "start_s": Metric("s until the first step's record", "lower"),
    "step_s": Metric("s, median", "lower"),
    "tokens_per_s": Metric("per GPU", "higher"),
    "mfu": Metric("", "higher"),
    "scaling": Metric("of one GPU's rate", "higher"),
    "reserved_gib": Metric("GiB, main rank", "lower"),
    "planned_gib": Metric("GiB", "none"),
    "data_wait": Metric("share", "lower"),
    "checkpoint_s": Metric("s longer", "lower"),
    "checkpoint_written_s": Metric("s until complete", "lower"),
    "command_s": Metric("s", "none"),
}
PHASES = ("launch", "imports", "process group", "facts", "plans", "model", "first packs", "kernels", "first step")
"""Of the start, as `eagle train` prints them."""
METRICS |= {phase.replace(" ", "_") + "_s": Metric("s of the start", "lower") for phase in PHASES}
SAVED = 9
"""Steps before the checkpoint; after twice as many, the next one would be written."""
LOW: dict[str, Any] = {"model": {"weights": "bfloat16"}, "stage": {"optimizer": "adamw8bit"}}


@dataclass(frozen=True)
class Case:
    """One run. processes: 0 is all GPUs. shared: whether all of them share a pack. packs: of a step, for every GPU or, where they are
    shared, in all. frames: of a video at most. cut: the command is killed when its last step is recorded, before it writes 33 GB."""

    name: str
    processes: int
    tokens: int
    steps: int
    shared: bool = False
    save: bool = False
    packs: int = 1
    frames: int = 1024
    cut: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("one-32k", 1, 32768, 6, settings=LOW),
    Case("data-32k", 0, 32768, 2 * SAVED - 1, save=True, cut=True, settings=LOW),
    Case("context-128k", 0, 131072, 4, shared=True, settings=LOW),
    Case("adamw-32k", 0, 32768, 5),
    Case("limited-128k", 0, 131072, 4, shared=True, settings={"model": {"gpu_memory": 58}}),
    Case("one-256k", 1, 262144, 1, cut=True, settings=LOW),
    Case("one-512k", 1, 524288, 1, frames=2048, cut=True, settings=LOW | {"model": {"weights": "bfloat16", "activations": "offload"}}),
    Case("sums-32k", 1, 32768, 4, packs=3, settings=LOW),
    Case("one-2b-32k", 1, 32768, 4, packs=2, settings={"model": {"preset": "2b"}}),
]


def make_rows(folder: Path, seconds: int, rows: int) -> None:
    """tokenizer, video.mp4 (four frames a second) and rows.jsonl."""
    import av

    from eagle_model.tokenizer import train_tokenizer

    with av.open(str(folder / "video.mp4"), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=Fraction(4))
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        generator = np.random.default_rng(0)
        for _ in range(4 * seconds):
            small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(small.repeat(20, 0).repeat(20, 1), format="rgb24")))
        container.mux(stream.encode())
    line = '{"id": %d, "video": "video.mp4", "conversations": [{"from": "human", "value": "<video>What is shown in part %d?"}, '
    line += '{"from": "gpt", "value": "Coloured squares that change, part %d of the film."}]}\n'
    (folder / "rows.jsonl").write_text("".join(line % (index, index, index) for index in range(rows)))
    train_tokenizer(["What is shown in part 1? Coloured squares that change, part 1 of the film."] * 4, vocab_size=400).save_pretrained(
        folder / "tokenizer"
    )


def configuration(case: Case, processes: int, small: bool) -> dict[str, Any]:
    tokens = case.tokens // 16 if small else case.tokens
    settings = {} if small else case.settings
    packs = case.packs * (1 if case.shared else processes)
    stage = {"name": case.name, "max_tokens": tokens, "packs_per_step": packs, "steps": case.steps, "lr": 1.0e-5}
    return {
        "run": {"name": case.name, "log_every": 1},
        "model": {"preset": "tiny" if small else "8b", "tokenizer": "tokenizer"} | settings.get("model", {}),
        "data": {"sources": {"film": {"annotation": "rows.jsonl"}}},
        "sampling": {"fps": max(2.0, case.frames / 512), "max_frames": case.frames},
        "stages": [stage | settings.get("stage", {})],
        "parallel": {"all_gather": processes} if case.shared else {},
        "checkpoint": {"every": SAVED if case.save else 1000, "keep": 1},
    }


def records(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


class Watched(NamedTuple):
    """Seconds since the start of a command: when each record was there, when a checkpoint was complete (0 for none), and the end."""

    recorded: list[float]
    complete: float
    end: float


def watched(command: list[str], folder: Path, run: Path, cut_after: int | None) -> Watched:
    """Run a command that writes metrics and checkpoints to `run`, until it ends or has written `cut_after` records and is killed.

    Raises RuntimeError with the end of its output when it fails.
    """
    begin, recorded, complete = time.monotonic(), list[float](), 0.0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                now = time.monotonic() - begin
                recorded += [now] * (records(run / "metrics.jsonl") - len(recorded))
                complete = complete or now * (latest(run / "checkpoints") is not None)
                if cut_after is not None and len(recorded) >= cut_after:
                    break
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        seconds = time.monotonic() - begin
        code = process.wait()
        if code and not (cut_after is not None and len(recorded) >= cut_after):
            output.seek(0)
            raise RuntimeError(f"exit code {code}: {output.read().decode(errors='replace')[-1500:]}")
    return Watched(recorded, complete, seconds)


def run(folder: Path, case: Case, processes: int, small: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, details) of one run, which is removed. Raises RuntimeError with the end of the output when the command fails."""
    (folder / f"{case.name}.yaml").write_text(yaml.safe_dump(configuration(case, processes, small)))
    command = [sys.executable, "-m", "eagle_train.cli", "train", f"{case.name}.yaml", "--nproc", str(processes)]
    command += ["--device", "cpu"] if small else []
    place = folder / "runs" / case.name
    times = watched(command, folder, place, case.steps if case.cut else None)
    steps = [record for record in Metrics(place / "metrics.jsonl") if record["kind"] == "step"]
    shutil.rmtree(place)  # with checkpoints of 50 GB
    later = (steps[2:SAVED] if case.save else steps[2:]) or steps[-1:]
    usual = statistics.median(record["seconds"] for record in later)
    rate = statistics.median(record["tokens_per_second"] for record in later) / processes
    found = {"start_s": times.recorded[0], "step_s": usual, "tokens_per_s": rate, "command_s": times.end}
    found |= {"reserved_gib": steps[-1]["memory_peak"] / GIB, "data_wait": statistics.mean(record["data_wait"] for record in later)}
    found |= {phase.replace(" ", "_") + "_s": seconds for phase, seconds in steps[0]["start"].items()}
    if "memory_planned" in steps[-1]:
        found["planned_gib"] = steps[-1]["memory_planned"] / GIB
    if "mfu" in steps[-1]:
        found["mfu"] = statistics.median(record["mfu"] for record in later)
    if case.save:
        found["checkpoint_s"] = sum(record["seconds"] - usual for record in steps[SAVED:])
        if times.complete:
            found["checkpoint_written_s"] = times.complete - times.recorded[SAVED - 1]
    return found, {"step_seconds": [record["seconds"] for record in steps]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], default=[case.name for case in CASES[:4]])
    parser.add_argument("--folder", type=Path, help="where runs are written (default: a temporary folder); 50 GB")
    parser.add_argument("--until", type=float, default=float("inf"), help="no case starts later than so many seconds after the start")
    parser.add_argument("--gpus", type=int, help="how many are meant by all (default: those of this host; 2 processes with --small)")
    parser.add_argument("--small", action="store_true")
    add_out(parser)
    options = parser.parse_args()
    gpus = options.gpus or (2 if options.small else torch.cuda.device_count())
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder {options.folder} is not a folder")
    if not options.small and gpus > torch.cuda.device_count() > 0:
        parser.error(f"--gpus {gpus}: this host has {torch.cuda.device_count()}")
    if gpus == 0 or not (options.small or torch.cuda.is_available()):
        parser.error("no CUDA device is available; --small runs on a CPU")
    if found := os.environ.get("PYTHONPATH"):  # runs start in another folder
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, found.split(os.pathsep)))
    begin = time.monotonic()
    result = Result("eagle-train/scaling", environment(LIBRARIES, gpus=0 if options.small else gpus), METRICS, settings={"gpus": gpus})
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_rows(folder, 40 if options.small else 520, 64)
        alone, failed = None, False
        for case in (case for case in CASES if case.name in options.only):
            processes = case.processes or gpus
            label = f"{case.name}, {processes} GPU{'s' * (processes > 1)}"
            if time.monotonic() - begin > options.until:
                result.absent.append(Absent(label, "ours", "not started: the time was up"))
                continue
            try:
                found, details = run(folder, case, processes, options.small)
            except Exception as error:
                print(f"{label}: {error}", flush=True)
                result.absent.append(Absent(label, "ours", str(error)[-300:]))
                failed = True
                continue
            alone = found["tokens_per_s"] if case.name == "one-32k" else alone
            if case.name == "data-32k" and alone is not None:
                found["scaling"] = found["tokens_per_s"] / alone
            result.add(label, details=details, **found)
            print(label, {key: round(value, 3) for key, value in found.items()}, flush=True)
            if options.out is not None:
                write(result, options.out)
    report(result, options.out)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
