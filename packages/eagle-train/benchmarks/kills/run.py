"""`eagle train` over several ranks, one of which is killed at random points of time, again and again; the same command continues the run.

    python packages/eagle-train/benchmarks/kills/run.py --ranks 8 --device cpu [--size tiny] [--kills 8] [--out FILE.json]
    python packages/eagle-train/benchmarks/kills/run.py --ranks 8 --size 8b [--folder DIR] [--out FILE.json]

Packs are mixed: text alone, one long video, hundreds of images. Two stages, context parallel groups of up to four ranks, sharded weights.
One run is not disturbed. The other one loses a rank, chosen at random, at one of these moments in turn: `step` (a random time in a step),
`checkpoint` (its files are being written), `read` (the rank reads media), `reader` (first the process that reads for it is killed, which
the run must survive, then the rank), `start` (before the first step), `halt` (the rank is stopped, so that nothing ends by itself: the
watchdog must name the wait; then it is killed).

`ended_s`: from the kill to the end of the command, with no process left. `named_s`: from the halt to the line of the watchdog; `went_on_s`:
from the end of a reading process to the record of another step. `errors`: messages that the command printed; `lost_steps`: of those that
had a record, how many the next start had to repeat. In the end, records and final weights of both runs are compared, bit for bit. Exits
with 1 when a kill took longer than the watchdog's limit, ended with exit code 0, left processes, or printed no error or several, and when
the runs differ.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from processes import MARK, Processes, has_open, send
from rows import SIZES, configuration, write_rows

sys.path.insert(0, str(Path(__file__).parents[4]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report, write
from benchmarks.rivals import Absent
from eagle_train.training import checkpoint
from eagle_train.training.heartbeat import EVERY
from eagle_train.training.metrics import Metrics, same_run

LIMIT = EVERY
"""Seconds of the watchdog: a kill must have ended the command by then."""
NAMED = 1.5 * EVERY
"""Seconds after which a wait must have been named: both watchdogs look now and then, and after `EVERY`."""
MOMENTS = ("step", "checkpoint", "read", "reader", "start", "halt")
LIBRARIES = ("torch", "transformers", "triton", "flash-attn-4", "av")
METRICS = {
    "ended_s": Metric("s", "lower"),
    "named_s": Metric("s", "lower"),
    "went_on_s": Metric("s", "lower"),
    "exit_code": Metric("", "none"),
    "errors": Metric("messages", "none"),
    "left": Metric("processes", "lower"),
    "lost_steps": Metric("", "lower"),
    "start_s": Metric("s until the first step's record", "lower"),
    "step_s": Metric("s, median", "none"),
    "steps": Metric("", "none"),
    "records_equal": Metric("1: yes", "higher"),
    "weights_equal": Metric("1: yes", "higher"),
}


@dataclass
class Command:
    """A running `eagle train`. file: inode of metrics.jsonl before, which a run that continues replaces; saved: steps of the newest
    checkpoint before."""

    process: subprocess.Popen[bytes]
    processes: Processes
    output: IO[bytes]
    metrics: Path
    file: int
    saved: int
    began: float

    def steps(self) -> list[dict[str, Any]]:
        return [record for record in Metrics(self.metrics) if record["kind"] == "step"]

    def new_steps(self) -> list[dict[str, Any]]:
        """Records of the steps that this command has trained."""
        if not self.metrics.exists() or self.metrics.stat().st_ino == self.file:
            return []
        return [record for record in self.steps() if record["total_step"] > self.saved]

    def text(self) -> str:
        return Path(self.output.name).read_text(errors="replace")

    def wait_for(self, moment: Callable[[], Any], seconds: float) -> Any:
        """What `moment` returns, as soon as it is true; None when the command ends before, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if found := moment():
                return found
            time.sleep(0.003)
        return None


class Campaign:
    """One folder with its data, the undisturbed run `calm` and the other one, `killed`."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.ranks, self.device, self.seconds = folder, options.ranks, options.device, options.start_limit
        self.draw, self.starts = random.Random(options.seed), itertools.count()
        size = SIZES[options.size]
        self.every = size.every
        write_rows(folder, size)
        for name in ("calm", "killed"):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(configuration(name, size, self.ranks, options.steps)))

    def start(self, name: str) -> Command:
        number = next(self.starts)
        command = [sys.executable, "-m", "eagle_train.cli", "train", f"{name}.yaml", "--nproc", str(self.ranks)]
        command += ["--device", self.device] if self.device else []
        mark, metrics = f"{os.getpid()}-{number}", self.folder / "runs" / name / "metrics.jsonl"
        output = (self.folder / f"{name}-{number}.txt").open("wb")
        file, saved = metrics.stat().st_ino if metrics.exists() else 0, self.saved(name)
        process = subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=output, env=os.environ | {MARK: mark})
        return Command(process, Processes(mark), output, metrics, file, saved, time.monotonic())

    def saved(self, name: str) -> int:
        """Steps of a run's newest checkpoint."""
        path = checkpoint.latest(self.folder / "runs" / name / "checkpoints")
        return 0 if path is None else checkpoint.read_progress(path).total_steps

    def finish(self, name: str) -> tuple[Command, float]:
        """Let a run go to its end; also the seconds until its first new step. Raises RuntimeError when it fails."""
        command = self.start(name)
        try:
            command.wait_for(command.new_steps, self.seconds)
            first = time.monotonic() - command.began
            if command.process.wait():
                raise RuntimeError(f"{name} ended with exit code {command.process.returncode}: {command.text()[-2000:]}")
            return command, first
        finally:
            command.processes.end(0.0 if command.process.poll() is None else 3.0)
            command.output.close()

    def kill(self, moment: str, start_s: float, step_s: float) -> tuple[dict[str, float], dict[str, Any]]:
        """Start or continue the run and kill one of its ranks. Raises RuntimeError when the moment does not come."""
        command, rank = self.start("killed"), self.draw.randrange(self.ranks)
        try:
            found, rank = self._await(command, moment, rank, start_s, step_s)
            named: dict[str, float] = {}
            if moment == "reader":
                named["went_on_s"] = self._lose_reader(command, found)
                found = self._or_late(command, moment, command.processes.rank(rank))
            done = command.steps()
            if moment == "halt":
                named["named_s"] = self._halt(command, found)
            killed = time.monotonic()
            if not send(found, signal.SIGKILL):
                raise RuntimeError("the process ended by itself")
            try:
                code = command.process.wait(timeout=3 * LIMIT)
            except subprocess.TimeoutExpired:
                code = 0  # as bad as a command that takes the end of a rank for success
            left = command.processes.end()
            seconds, text = time.monotonic() - killed, command.text()
        finally:
            command.processes.end(0.0)
            command.process.wait()
            command.output.close()
        errors = re.findall(r"^error: .*", text, re.MULTILINE)
        last = max((record["total_step"] for record in done), default=0)
        metrics = {"ended_s": seconds, "exit_code": code, "errors": len(errors), "left": left}
        metrics["lost_steps"] = max(0, last - self.saved("killed"))
        return metrics | named, {"rank": rank, "after_step": last, "said": errors, "output": text.replace(str(self.folder), ".")[-3000:]}

    def _await(self, command: Command, moment: str, rank: int, start_s: float, step_s: float) -> tuple[int, int]:
        """The process to kill, when it is time, and its rank, which is another one where the moment asks for it."""
        if moment == "start":
            time.sleep(self.draw.uniform(0.0, start_s))
            found = command.wait_for(lambda: command.processes.rank(rank), start_s)
            return self._or_late(command, moment, found), rank
        more = self.draw.randint(1, self.every + 1)  # steps that the run has continued by
        begun = command.wait_for(lambda: len(command.new_steps()) >= more, self.seconds)
        media, writing = self.folder / "media", self.folder / "runs/killed/checkpoints"
        found = None
        if begun and moment == "checkpoint":
            if command.wait_for(lambda: any(writing.glob(".writing-*/*")), self.seconds):
                time.sleep(self.draw.uniform(0.0, 0.03))
                found = command.processes.rank(rank)
        elif begun and moment in ("read", "reader"):
            # Whichever rank reads next: looking for the processes takes longer than a file is open.
            ranks = {number: of for number, of in command.processes.alive().items() if of is not None}
            reader = command.wait_for(lambda: next((number for number in ranks if has_open(number, media)), None), self.seconds)
            rank = rank if reader is None else ranks[reader]
            found = command.processes.rank(rank) if reader and moment == "read" else reader
        elif begun:
            time.sleep(self.draw.uniform(0.0, step_s))
            found = command.processes.rank(rank)
        return self._or_late(command, moment, found), rank

    def _or_late(self, command: Command, moment: str, found: int | None) -> int:
        if found is None:
            code = command.process.poll()
            raise RuntimeError(
                f"the moment {moment} did not come; exit code {code}: {command.text()[-500:]}" if code else f"{moment}: the run was over"
            )
        return found

    def _lose_reader(self, command: Command, number: int) -> float:
        """Kill a process that reads; the seconds until the record of a step that was not under way."""
        begin, before = time.monotonic(), len(command.new_steps())
        send(number, signal.SIGKILL)
        went_on = command.wait_for(lambda: len(command.new_steps()) > before + 1, 3 * LIMIT)
        return time.monotonic() - begin if went_on else 3 * LIMIT

    def _halt(self, command: Command, number: int) -> float:
        """Stop a process; the seconds until a line says what the others wait in."""
        begin, before = time.monotonic(), len(command.text())
        send(number, signal.SIGSTOP)
        said = command.wait_for(lambda: re.search(r"has waited \d|: \d+ s, now in|: \d+:\d\d, now in", command.text()[before:]), 3 * NAMED)
        return time.monotonic() - begin if said else 3 * NAMED

    def compare(self) -> tuple[bool, bool]:
        """Whether records and final weights are equal."""
        runs = [self.folder / "runs" / name for name in ("calm", "killed")]
        calm, killed = (same_run(Metrics(run / "metrics.jsonl")) for run in runs)
        return calm == killed, equal_weights(*(run / "checkpoints/whole-end" for run in runs))


def equal_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    found = []
    for folder in (one, other):
        with tempfile.NamedTemporaryFile(dir=folder.parent, suffix=".pt") as file:
            dcp_to_torch_save(folder, file.name)
            found.append(dict(tensors(torch.load(file.name, weights_only=True))))
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def tensors(state: Any, name: str = "") -> Any:
    """Names and tensors of a nested state."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{name}.{key}")
    elif hasattr(state, "dtype"):
        yield name, state


def broken(metrics: dict[str, float]) -> list[str]:
    """What is wrong with the end of a command whose rank was killed."""
    rules = {
        f"it took longer than {LIMIT:.0f} s to end": metrics["ended_s"] > LIMIT,
        "the exit code is 0": metrics["exit_code"] == 0,
        "it left processes": metrics["left"] > 0,
        f"{metrics['errors']:.0f} errors were printed": metrics["errors"] != 1,
        f"no wait was named within {NAMED:.0f} s": metrics.get("named_s", 0.0) > NAMED,
        f"no step followed within {LIMIT:.0f} s of the end of a reading process": metrics.get("went_on_s", 0.0) > LIMIT,
    }
    return [text for text, holds in rules.items() if holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="as of eagle train")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="model and context (default: tiny)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kills", type=int, default=len(MOMENTS))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=float("inf"), help="no kill is tried later than so many seconds after the start")
    parser.add_argument("--start-limit", type=float, default=600.0, help="seconds in which a step, or the moment for a kill, must come")
    parser.add_argument("--folder", type=Path, help="where runs are written (default: a temporary folder)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the outputs of the commands here")
    add_out(parser)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its runs are ended too
    settings = {name: getattr(options, name) for name in ("ranks", "device", "size", "steps", "kills", "seed")}
    gpus = 0 if options.device == "cpu" else options.ranks
    result = Result("eagle-train/kills", environment(LIBRARIES, gpus=gpus), METRICS, settings=settings)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        try:
            failed = campaign(Campaign(Path(name).resolve(), options), options, result)
        finally:
            if options.keep is not None:
                options.keep.mkdir(parents=True, exist_ok=True)
                for path in Path(name).glob("*.txt"):
                    shutil.copy(path, options.keep)
    report(result, options.out)
    for text in failed:
        print(f"failed: {text}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def campaign(runs: Campaign, options: argparse.Namespace, result: Result) -> list[str]:
    """Both runs; what is wrong with them."""
    begin, failed = time.monotonic(), []

    def keep() -> None:
        if options.out is not None:
            write(result, options.out)

    calm, start_s = runs.finish("calm")
    steps = calm.steps()
    step_s = statistics.median(record["seconds"] for record in steps)
    result.add("not disturbed", start_s=start_s, step_s=step_s, steps=len(steps))
    print(f"not disturbed: first step after {start_s:.1f} s, {len(steps)} steps of {step_s:.2f} s", flush=True)
    for number, moment in zip(range(1, options.kills + 1), itertools.cycle(options.moments)):
        label = f"kill {number}: {moment}"
        if time.monotonic() - begin > options.until:
            result.absent.append(Absent(label, "ours", "not tried: the time was up"))
            continue
        try:
            metrics, details = runs.kill(moment, start_s, step_s)
        except RuntimeError as error:
            print(f"{label}: {error}", flush=True)
            result.absent.append(Absent(label, "ours", str(error)[-300:]))
            if "the run was over" in str(error):
                break
            failed.append(f"{label}: {error}")
            continue
        failed += [f"{label}: {text}" for text in broken(metrics)]
        result.add(label, details=details, **metrics)
        print(f"{label}, rank {details['rank']}, after step {details['after_step']}: {metrics}", *details["said"], sep="\n  ", flush=True)
        keep()
    ended, again = runs.finish("killed")
    records, weights = runs.compare()
    failed += [
        f"{what} differ from those of the undisturbed run" for what, same in (("records", records), ("weights", weights)) if not same
    ]
    result.add("continued to the end", start_s=again, steps=len(ended.steps()), records_equal=records, weights_equal=weights)
    keep()
    return failed


if __name__ == "__main__":
    main()
