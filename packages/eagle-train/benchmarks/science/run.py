"""What long context buys, in small models: trains and evaluates every arm of `experiments.py`, several at a time on every GPU.

    python run.py --out results                          # data, then all runs; two GPUs: --gpus 2 --parallel 7 --deadline 480
    python run.py --out results --small                  # every kind of arm for a few steps, on a CPU
    python run.py --out results --only base,video --seeds 1
    python run.py --plot results/science.json            # Markdown and plots of a result

Results are written after every run to --out: `science.json`, `science.md`, and `science.log` with the ends of the logs of runs that failed.
Data and run folders are in --work. A run that would not end before --deadline is stopped and is named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data import SMALL, Amounts, make
from experiments import Run, all_runs
from report import plot, table

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Options(NamedTuple):
    """What the command line says."""

    out: Path
    work: Path
    gpus: int
    parallel: int
    deadline: float
    seeds: int
    scale: float
    only: tuple[str, ...]
    small: bool


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Folder of results.")
    parser.add_argument("--work", type=Path, default=Path("/tmp/eagle-science"), help="Folder of data and runs; data there are used again.")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs; 0: the CPU.")
    parser.add_argument("--parallel", type=int, default=1, help="Runs at a time on every GPU (in all, on the CPU).")
    parser.add_argument("--deadline", type=float, default=1e9, help="Seconds after which runs are stopped.")
    parser.add_argument("--seeds", type=int, default=3, help="Seeds of every arm.")
    parser.add_argument("--scale", type=float, default=1.0, help="Multiplies the steps of every run.")
    parser.add_argument("--only", default="", help="Experiments, separated by commas; bases that they start from are added.")
    parser.add_argument("--small", action="store_true", help="Little data, three steps a stage, one seed.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path, help="Write Markdown and plots next to this result, and nothing else.")
    given = parser.parse_args()
    if given.plot is not None:
        plot(given.plot)
        return
    if given.out is None:
        parser.error("--out is missing")
    only = tuple(filter(None, given.only.split(",")))
    options = Options(
        given.out.absolute(),
        given.work.absolute(),
        given.gpus,
        given.parallel,
        given.deadline,
        1 if given.small else given.seeds,
        0.0 if given.small else given.scale,
        only,
        given.small,
    )
    if given.one is not None:
        one_process(options, given.one)
    else:
        everything(options)


def chosen(options: Options) -> list[Run]:
    """The runs that the options ask for, with the bases that they need, in the order in which they start."""
    dtype = "bfloat16" if options.gpus else "float32"
    runs = all_runs(options.work / "data", tuple(range(options.seeds)), options.scale, dtype)
    if options.only:
        wanted = [run for run in runs if run.experiment in options.only]
        needed = {run.name for run in wanted} | {run.after for run in wanted}
        runs = [run for run in runs if run.name in needed]
    return [run._replace(frames=run.frames[::5]) for run in runs] if options.small else runs


def everything(options: Options) -> None:
    """Make the data, measure all rows once, and go through the runs."""
    begin = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(THREADS)
    processes = os.cpu_count() or 1
    data = options.work / "data"
    if not data.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        make(data, SMALL if options.small else Amounts(), processes)
    print(f"[{time.time() - begin:5.1f} s] data are made", flush=True)
    runs = chosen(options)
    prepare_all(runs, options, processes)
    print(f"[{time.time() - begin:5.1f} s] rows are measured; {len(runs)} runs", flush=True)
    shutil.rmtree(options.work / "runs", ignore_errors=True)
    (options.work / "runs").mkdir()
    Queue(runs, options, begin).go()


def prepare_all(runs: list[Run], options: Options, processes: int) -> None:
    """Measure the rows of every set of sources once; the runs find them."""
    sets = {json.dumps(run.config["data"], sort_keys=True): run for run in runs}
    with ProcessPoolExecutor(min(processes, len(sets))) as pool:
        for job in [pool.submit(_prepare, run.config) for run in sets.values()]:
            job.result()


def _prepare(config: dict[str, Any]) -> None:
    from eagle_train.config import parse_config
    from eagle_train.runs.ready import get_ready

    get_ready(parse_config(config))


def one_process(options: Options, name: str) -> None:
    """The process of one run: its result, or the reason why there is none, as JSON."""
    begin = time.time()
    from single import run_one, write_result

    run = next(run for run in chosen(options) if run.name == name)
    try:
        result = run_one(run, options.work / "runs", "cuda" if options.gpus else "cpu", begin)
    except BaseException:
        traceback.print_exc()
        result = {"experiment": run.experiment, "arm": run.arm, "seed": run.seed, "failed": traceback.format_exc()[-2000:]}
    write_result(result, options.work / "runs" / f"{name}.json")


class Queue:
    """Starts a process for every run as slots become free, and writes results after each."""

    def __init__(self, runs: list[Run], options: Options, begin: float) -> None:
        self.waiting, self.options, self.begin = list(runs), options, begin
        self.results: list[dict[str, Any]] = []
        self.running: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
        self.slots = max(1, options.gpus) * options.parallel
        self.done: set[str] = set()
        self.failed: set[str] = set()

    def go(self) -> None:
        """Until every run ended or the time is up."""
        try:
            while self.waiting or self.running:
                self._start()
                self._collect()
                if time.time() - self.begin > self.options.deadline:
                    break
                time.sleep(0.1)
        finally:
            self._give_up()
        self._write()
        print(table(self._content()), flush=True)

    def _start(self) -> None:
        for slot in range(self.slots):
            if slot in self.running:
                continue
            ready = [run for run in self.waiting if run.after is None or run.after in self.done]
            if not ready:
                return
            self.waiting.remove(ready[0])
            self.running[slot] = ready[0], self._process(ready[0], slot)

    def _process(self, run: Run, slot: int) -> subprocess.Popen[bytes]:
        """Slots of the GPUs alternate."""
        options = self.options
        command = [sys.executable, __file__, "--out", str(options.out), "--work", str(options.work), "--one", run.name]
        command += ["--gpus", str(options.gpus), "--seeds", str(options.seeds), "--scale", str(options.scale)]
        command += ["--small"] if options.small else []
        visible = {"CUDA_VISIBLE_DEVICES": str(slot % options.gpus)} if options.gpus else {}
        with open(options.work / "runs" / f"{run.name}.log", "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | visible, start_new_session=True)

    def _collect(self) -> None:
        for slot, (run, process) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[slot]
            path = self.options.work / "runs" / f"{run.name}.json"
            lost = {"experiment": run.experiment, "arm": run.arm, "seed": run.seed, "failed": f"exit status {process.returncode}"}
            result = json.loads(path.read_text()) if path.is_file() else lost
            self.results.append(result)
            ok = "failed" not in result
            (self.done if ok else self.failed).add(run.name)
            if not ok:  # runs that would start from it can't
                for other in [other for other in self.waiting if other.after == run.name]:
                    self.waiting.remove(other)
                    self._lost(other, f"{run.name} failed")
            print(f"[{time.time() - self.begin:5.1f} s] {run.name}: {summary(result)}", flush=True)
            self._write()

    def _give_up(self) -> None:
        for run, process in self.running.values():
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that read for it
            self._lost(run, "stopped at the deadline")
        for run in self.waiting:
            self._lost(run, "not started before the deadline")
        self.running, self.waiting = {}, []

    def _lost(self, run: Run, why: str) -> None:
        self.results.append({"experiment": run.experiment, "arm": run.arm, "seed": run.seed, "failed": why})

    def _content(self) -> dict[str, Any]:
        options = self.options
        settings = {"gpus": options.gpus, "parallel": options.parallel, "scale": options.scale, "seeds": options.seeds}
        return {"seconds": round(time.time() - self.begin, 1), "settings": settings, "runs": self.results}

    def _write(self) -> None:
        content, out = self._content(), self.options.out
        (out / "science.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "science.md").write_text(table(content), encoding="utf-8")
        logs = [self.options.work / "runs" / f"{name}.log" for name in sorted(self.failed)]
        texts = [f"== {log.name}\n{log.read_text(errors='replace')[-4000:]}\n" for log in logs if log.is_file()]
        (out / "science.log").write_text("".join(texts), encoding="utf-8")


def summary(result: dict[str, Any]) -> str:
    """One line about a run."""
    if "failed" in result:
        return f"FAILED: {result['failed'].strip().splitlines()[-1][:200]}"
    best: dict[str, float] = {}
    for point in result["points"]:
        best[point["source"]] = point["accuracy"]
    scores = ", ".join(f"{name} {value:.2f}" for name, value in best.items())
    return f"loss {result['loss']:.3f}, {result['tokens'] / 1e6:.2f}M tokens, {result['seconds']}, {scores}"


if __name__ == "__main__":
    main()
