"""What long context buys, in models of 55 M parameters on a GPU, or of 0.4 M on CPU threads: trains and evaluates every arm of
`experiments.py`, each in a process of its own.

    python run.py --out results                          # data, then all runs, as many at a time as there are cores
    python run.py --out results --size large --parallel 10
    python run.py --out results --deadline 480           # what has not ended by then is stopped; the same command again continues
    python run.py --out results --trial                  # every kind of arm for a few steps, with a smaller model, on a CPU
    python run.py --out results --only video --seeds 1
    python run.py --out results --only fill,text-ads-2   # an experiment, and a run of another
    python run.py --join a.json b.json --out both        # one result; of runs that several have, the first that ended counts
    python run.py --plot results/science.json            # Markdown and plots of a result

Results are written after every run to --out: `science.json`, `science.md`, and `science.log` with the ends of the logs of runs that failed.
Data and run folders are in --work; data, and runs that ended there with the same configuration, are used again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data import FEW, Amounts, make
from experiments import IMAGE_EXPERIMENTS, Run, all_runs
from report import join, plot, table
from sizes import SIZES, Size, trial

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ENVIRONMENT = THREADS | {"TOKENIZERS_PARALLELISM": "false"}


class Options(NamedTuple):
    """What the command line says."""

    out: Path
    work: Path
    parallel: int
    deadline: float
    seeds: int
    scale: float
    only: tuple[str, ...]
    size: str
    trial: bool

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return self.work / "runs"

    @property
    def data(self) -> Path:
        """Folder of the data: with --only, of a kind of media when no other is needed."""
        return self.work / "-".join(["data", *(self.media if len(self.media) == 1 else ())])

    @property
    def media(self) -> tuple[str, ...]:
        """The kinds of media that are needed."""
        experiments = {name.partition("-")[0] for name in self.only}
        images = experiments & (IMAGE_EXPERIMENTS | {"base"}) if experiments else {"all"}
        clips = experiments - IMAGE_EXPERIMENTS if experiments else {"all"}
        return (*(["clips"] if clips else []), *(["images"] if images else []))

    @property
    def models(self) -> Size:
        """The models, and how they are trained."""
        return trial(SIZES[self.size]) if self.trial else SIZES[self.size]


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Folder of results.")
    parser.add_argument("--work", type=Path, help="Folder of data and runs (default: work in --out).")
    parser.add_argument("--parallel", type=int, default=len(os.sched_getaffinity(0)), help="Runs at a time (default: one a core).")
    parser.add_argument("--deadline", type=float, default=1e9, help="Seconds after which runs are stopped.")
    parser.add_argument("--seeds", type=int, default=3, help="Seeds of every arm.")
    parser.add_argument("--scale", type=float, default=1.0, help="Multiplies the steps of every run.")
    parser.add_argument("--only", default="", help="Experiments or runs (text-ads-2), separated by commas; what they start from is added.")
    parser.add_argument("--size", choices=SIZES, default="small", help="small: on CPU threads; large: on a GPU.")
    parser.add_argument("--trial", action="store_true", help="Little data, three steps a stage, one seed, a smaller model, no GPU.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--join", type=Path, nargs="+", help="Write these results as one to --out, and nothing else.")
    parser.add_argument("--plot", type=Path, help="Write Markdown and plots next to this result, and nothing else.")
    given = parser.parse_args()
    if given.plot is not None:
        plot(given.plot)
        return
    if given.out is None:
        parser.error("--out is missing")
    out = given.out.absolute()
    if given.join is not None:
        write(join([json.loads(path.read_text(encoding="utf-8")) for path in given.join]), out)
        return
    options = Options(
        out,
        (given.work or out / "work").absolute(),
        given.parallel,
        given.deadline,
        1 if given.trial else given.seeds,
        0.0 if given.trial else given.scale,
        tuple(filter(None, given.only.split(","))),
        given.size,
        given.trial,
    )
    if given.one is not None:
        one_process(options, given.one)
    else:
        everything(options)


def chosen(options: Options) -> list[Run]:
    """The runs that the options ask for, with the bases that they need, in the order in which they start."""
    runs = all_runs(options.data, tuple(range(options.seeds)), options.models, options.scale)
    if options.only:
        if unknown := set(options.only) - {name for run in runs for name in (run.experiment, run.name)}:
            sys.exit(f"--only {','.join(sorted(unknown))}: neither an experiment nor a run")
        needed = {run.name for run in runs if {run.experiment, run.name} & set(options.only)}
        for run in reversed(runs):  # what they start from comes before them
            if run.name in needed and run.after is not None:
                needed.add(run.after)
        runs = [run for run in runs if run.name in needed]
    return [run._replace(frames=run.frames[::5]) for run in runs] if options.trial else runs


def everything(options: Options) -> None:
    """Make the data, measure all rows once, and go through the runs."""
    begin, runs = time.time(), chosen(options)
    options.out.mkdir(parents=True, exist_ok=True)
    options.runs.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it has started
    if not options.data.exists():
        amounts = FEW if options.trial else Amounts().only("clips" in options.media, "images" in options.media)
        make(options.data, amounts, max(options.parallel, len(os.sched_getaffinity(0))))
    print(f"[{time.time() - begin:5.1f} s] data are made", flush=True)
    # One process for every set of sources that is measured: runs that read the same rows find what was measured.
    sets = {json.dumps(run.config["data"], sort_keys=True): run for run in runs}
    with ProcessPoolExecutor(min(options.parallel, len(sets))) as pool:
        measured = [(run, pool.submit(_prepare, run.config)) for run in sets.values()]
        for run, job in measured:
            if run.after is None:  # the others are measured while bases are trained
                job.result()
        print(f"[{time.time() - begin:5.1f} s] rows of bases are measured; {len(runs)} runs, {options.parallel} at a time", flush=True)
        Queue(runs, options, begin).go()


def _prepare(config: dict[str, Any]) -> None:
    from eagle_train.config import parse_config
    from eagle_train.runs.ready import get_ready

    get_ready(parse_config(config))


def one_process(options: Options, name: str) -> None:
    """The process of one run: its result, or the reason why there is none, as JSON."""
    from single import run_one, write_result

    runs = chosen(options)
    run = next(run for run in runs if run.name == name)
    exported = any(other.after == name for other in runs)
    shutil.rmtree(options.runs / name, ignore_errors=True)  # of a run that was stopped
    try:
        result = run_one(run, options.runs, options.models.device, exported)
    except BaseException:
        traceback.print_exc()
        result = about(run) | {"failed": traceback.format_exc()[-2000:]}
    write_result(result | {"configuration": digest(run, options.work)}, options.runs / f"{name}.json")


def machine(device: str) -> str:
    """Processor, cores, GPU and version of torch."""
    # In a process of its own: this one starts many, and needs neither torch nor memory on the GPU.
    shown = ["import torch", "print(torch.__version__)"] + (["print(torch.cuda.get_device_name())"] if device == "cuda" else [])
    asked = subprocess.run([sys.executable, "-c", "; ".join(shown)], capture_output=True, text=True, check=False)
    version, *card = asked.stdout.splitlines() or ["of unknown version"]
    return ", ".join([*card, platform.machine(), f"{os.cpu_count()} cores", f"torch {version}"])


def gpus() -> list[str]:
    """Of this process, as CUDA_VISIBLE_DEVICES names them."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return given.split(",")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def about(run: Run) -> dict[str, Any]:
    """Which run it is."""
    return {"experiment": run.experiment, "arm": run.arm, "seed": run.seed}


def digest(run: Run, work: Path) -> str:
    """Tells runs with other configurations apart, wherever their data are."""
    content = json.dumps([run.config, run.after, run.frames], sort_keys=True).replace(str(work), "")
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class Queue:
    """Starts a process for every run as slots become free, and writes results after each."""

    def __init__(self, runs: list[Run], options: Options, begin: float) -> None:
        self.options, self.begin = options, begin
        found = {run.name: result for run in runs if (result := self._found(run)) is not None and "failed" not in result}
        self.results = list(found.values())
        self.done, self.failed = set(found), set[str]()
        self.waiting = [run for run in runs if run.name not in found]
        self.machine = machine(options.models.device)
        self.running: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
        self.gpus = gpus() if options.models.device == "cuda" else [""]
        self.places: dict[str, str] = {}  # of running and ended runs: their GPU

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
        for run in list(self.waiting):
            if len(self.running) == self.options.parallel:
                return
            if run.after is None or run.after in self.done:
                self.waiting.remove(run)
                self.running[run.name] = run, self._process(run)

    def _process(self, run: Run) -> subprocess.Popen[bytes]:
        options = self.options
        command = [sys.executable, __file__, "--out", str(options.out), "--work", str(options.work), "--one", run.name]
        command += ["--size", options.size, "--seeds", str(options.seeds), "--scale", str(options.scale)]
        command += ["--only", ",".join(options.only), *(["--trial"] if options.trial else [])]
        busy = [self.places[name] for name in self.running]
        self.places[run.name] = min(self.gpus, key=busy.count)
        with open(options.runs / f"{run.name}.log", "wb") as log:
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": self.places[run.name]}
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)

    def _found(self, run: Run) -> dict[str, Any] | None:
        """The result that a process has written about exactly this run."""
        path = self.options.runs / f"{run.name}.json"
        result = json.loads(path.read_text()) if path.is_file() else {}
        return result if result.get("configuration") == digest(run, self.options.work) else None

    def _collect(self) -> None:
        for run, process in list(self.running.values()):
            if process.poll() is None:
                continue
            del self.running[run.name]
            result = self._found(run) or about(run) | {"failed": f"exit status {process.returncode}"}
            self.results.append(result)
            ok = "failed" not in result
            (self.done if ok else self.failed).add(run.name)
            if not ok:
                self._drop_those_after(run.name)
            print(f"[{time.time() - self.begin:5.1f} s] {run.name}: {summary(result)}", flush=True)
            self._write()

    def _drop_those_after(self, name: str) -> None:
        """Runs that would start from a run that failed can't."""
        for other in [other for other in self.waiting if other.after == name]:
            self.waiting.remove(other)
            self.results.append(about(other) | {"failed": f"{name} failed"})
            self._drop_those_after(other.name)

    def _give_up(self) -> None:
        for run, process in self.running.values():
            os.killpg(process.pid, signal.SIGKILL)
            self.results.append(about(run) | {"failed": "stopped at the deadline"})
        self.results += [about(run) | {"failed": "not started before the deadline"} for run in self.waiting]
        self.running, self.waiting = {}, []

    def _content(self) -> dict[str, Any]:
        options = self.options
        settings = {"parallel": options.parallel, "scale": options.scale, "seeds": options.seeds, "trial": options.trial}
        settings |= {"size": options.size, "machine": self.machine}
        return {"seconds": round(time.time() - self.begin, 1), "settings": settings, "runs": self.results}

    def _write(self) -> None:
        write(self._content(), self.options.out)
        logs = [self.options.runs / f"{name}.log" for name in sorted(self.failed)]
        texts = [f"== {log.name}\n{log.read_text(errors='replace')[-4000:]}\n" for log in logs if log.is_file()]
        (self.options.out / "science.log").write_text("".join(texts), encoding="utf-8")


def write(content: dict[str, Any], out: Path) -> None:
    """A result and its table, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "science.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "science.md").write_text(table(content), encoding="utf-8")


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
