"""LMDB reads from worker processes and threads against raw py-lmdb, in turn in the same run.

    python packages/eagle-sampling/benchmarks/bench_lmdb.py [--reads 4000] [--rounds 7] [--out FILE.json]

Values of 100 kB (a photograph) and 4 kB in random order, warm. Raw: one environment per process, `with environment.begin()` around each
read, as its documentation shows. Raw, held: one read transaction kept for all reads of a thread, the minimum of py-lmdb (which forbids
closing and forking). Reads per second are of all workers together. `of_raw_wall` and `of_raw_cpu` are medians over rounds of the ratio to
raw in the same round, for reads per second of wall time and of CPU time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import lmdb
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.timing import ratios
from eagle_sampling.lmdb import store as lmdb_store

METRICS = {
    "reads_per_s": Metric("", "higher"),
    "reads_per_cpu_s": Metric("", "higher"),
    "of_raw_wall": Metric("", "higher"),
    "of_raw_cpu": Metric("", "higher"),
}
READERS = ("ours", "raw", "raw, held")
COUNT = 1000


def build(path: str, size: int) -> None:
    rng = np.random.default_rng(0)
    with lmdb.open(path, map_size=1 << 30) as environment, environment.begin(write=True) as transaction:
        for i in range(COUNT):
            transaction.put(b"%04d" % i, rng.bytes(size))


def loop(reader: str, path: str, seed: int, reads: int) -> Callable[[], None]:
    """A function that reads `reads` values."""
    order = np.random.default_rng(seed).integers(0, COUNT, reads).tolist()
    if reader == "ours":
        names = [f"{i:04d}" for i in order]

        def work() -> None:
            for name in names:
                lmdb_store.get(path, name)

        return work
    keys = [b"%04d" % i for i in order]
    environment = _environment(path)

    def work() -> None:
        if reader == "raw":
            for key in keys:
                with environment.begin() as transaction:
                    transaction.get(key)
            return
        with environment.begin() as transaction:
            for key in keys:
                transaction.get(key)

    return work


_environments: dict[str, lmdb.Environment] = {}


def _environment(path: str) -> lmdb.Environment:
    # A path can be opened once per process, so the store's own environment is closed.
    if path not in _environments:
        lmdb_store.close_all()
        _environments[path] = lmdb.open(path, readonly=True, lock=False, readahead=False)
    return _environments[path]


def in_threads(reader: str, path: str, threads: int, reads: int) -> tuple[float, float]:
    """Wall and CPU seconds of `threads` threads that each read `reads` values."""
    if reader == "ours" and path in _environments:
        _environments.pop(path).close()
    work = [loop(reader, path, seed, reads) for seed in range(threads)]
    loop(reader, path, 99, 50)()
    crew = [threading.Thread(target=job) for job in work]
    began, used = time.perf_counter(), time.process_time()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return time.perf_counter() - began, time.process_time() - used


def serve(pipe: Connection, path: str, reads: int) -> None:
    """A worker process: receives a reader's name, sends (wall, CPU) seconds."""
    while (reader := pipe.recv()) is not None:
        pipe.send(in_threads(reader, path, 1, reads))


def measure(result: Result, label: str, path: str, reads: int, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    for kind, number in (("thread", 1), ("thread", 2), ("thread", 4), ("process", 2), ("process", 4)):
        pipes: list[Connection] = []
        if kind == "process":
            for _ in range(number):
                here, there = context.Pipe()
                context.Process(target=serve, args=(there, path, reads), daemon=True).start()
                pipes.append(here)
        wall: dict[str, list[float]] = {reader: [] for reader in READERS}
        cpu: dict[str, list[float]] = {reader: [] for reader in READERS}
        for turn in range(rounds + 1):  # the first is a warm-up
            for reader in READERS if turn % 2 else READERS[::-1]:
                if kind == "thread":
                    took = in_threads(reader, path, number, reads // number)
                else:
                    began = time.perf_counter()
                    for pipe in pipes:
                        pipe.send(reader)
                    answers = [pipe.recv() for pipe in pipes]
                    took = time.perf_counter() - began, sum(used for _, used in answers)
                if turn:
                    wall[reader].append(took[0])
                    cpu[reader].append(took[1])
        total = reads if kind == "thread" else reads * number
        plural = "" if number == 1 else "s" if kind == "thread" else "es"
        for reader in READERS:
            result.add(
                f"{label}, {number} {kind}{plural}", reader,
                reads_per_s=total / statistics.median(wall[reader]), reads_per_cpu_s=total / statistics.median(cpu[reader]),
                of_raw_wall=statistics.median(ratios(wall["raw"], wall[reader])),
                of_raw_cpu=statistics.median(ratios(cpu["raw"], cpu[reader])),
            )  # fmt: skip
        for pipe in pipes:
            pipe.send(None)
    for opened in _environments.values():
        opened.close()
    _environments.clear()
    lmdb_store.close_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reads", type=int, default=4000, help="of 100 kB; ten times as many of 4 kB")
    parser.add_argument("--rounds", type=int, default=7)
    add_out(parser)
    options = parser.parse_args()
    settings = {"reads": options.reads, "rounds": options.rounds}
    result = Result("eagle-sampling/lmdb", environment(("lmdb", "numpy")), METRICS, settings=settings)
    with tempfile.TemporaryDirectory() as scratch:
        for size in (100_000, 4_000):
            path = str(Path(scratch) / str(size))
            build(path, size)
            measure(result, f"{size // 1000} kB", path, options.reads * (10 if size < 10_000 else 1), options.rounds)
    report(result, options.out)


if __name__ == "__main__":
    main()
