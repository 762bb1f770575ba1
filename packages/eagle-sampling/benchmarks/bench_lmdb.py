"""LMDB reads from worker processes and threads against raw py-lmdb, in turn in the same run.

    python bench_lmdb.py [--reads 4000] [--rounds 7]       writes results/lmdb.json and .md

Values of 100 kB (a photograph) and 4 kB in random order, warm. Raw: one environment per process, `with environment.begin()` around each
read, as its documentation shows. Raw, held: one read transaction kept for all reads of a thread, the minimum of py-lmdb (which forbids
closing and forking). Ratios are medians over rounds of neighbouring measurements: reads per second of wall time, and of CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import lmdb
import numpy as np
from bench_video import RESULTS, versions

from eagle_sampling.lmdb import store as lmdb_store

READERS = ("eagle", "raw", "raw, held")
COUNT = 1000


def build(path: str, size: int) -> None:
    rng = np.random.default_rng(0)
    with lmdb.open(path, map_size=1 << 30) as environment, environment.begin(write=True) as transaction:
        for i in range(COUNT):
            transaction.put(b"%04d" % i, rng.bytes(size))


def loop(reader: str, path: str, seed: int, reads: int) -> Callable[[], None]:
    """A function that reads `reads` values."""
    order = np.random.default_rng(seed).integers(0, COUNT, reads).tolist()
    if reader == "eagle":
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
    if reader == "eagle" and path in _environments:
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


def measure(path: str, reads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Keys such as "threads 4 eagle" -> reads per second of wall time and of CPU, with the ratios to raw."""
    found: dict[str, dict[str, float]] = {}
    context = multiprocessing.get_context("spawn")
    for kind, number in (("thread", 1), ("thread", 2), ("thread", 4), ("process", 2), ("process", 4)):
        pipes: list[Connection] = []
        if kind == "process":
            for _ in range(number):
                here, there = context.Pipe()
                context.Process(target=serve, args=(there, path, reads), daemon=True).start()
                pipes.append(here)
        times: dict[str, list[tuple[float, float]]] = {reader: [] for reader in READERS}
        for turn in range(rounds + 1):  # the first is a warm-up
            for reader in READERS if turn % 2 else READERS[::-1]:
                if kind == "thread":
                    result = in_threads(reader, path, number, reads // number)
                else:
                    began = time.perf_counter()
                    for pipe in pipes:
                        pipe.send(reader)
                    answers = [pipe.recv() for pipe in pipes]
                    result = time.perf_counter() - began, sum(cpu for _, cpu in answers)
                if turn:
                    times[reader].append(result)
        total = reads if kind == "thread" else reads * number
        for reader in READERS:
            found[f"{kind} {number} {reader}"] = {
                "reads_per_s": total / statistics.median(wall for wall, _ in times[reader]),
                "reads_per_cpu_s": total / statistics.median(cpu for _, cpu in times[reader]),
                "of_raw_wall": statistics.median(b[0] / a[0] for a, b in zip(times[reader], times["raw"])),
                "of_raw_cpu": statistics.median(b[1] / a[1] for a, b in zip(times[reader], times["raw"])),
            }
        for pipe in pipes:
            pipe.send(None)
    for environment in _environments.values():
        environment.close()
    _environments.clear()
    lmdb_store.close_all()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reads", type=int, default=4000, help="of 100 kB; ten times as many of 4 kB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in (100_000, 4_000):
            path = str(Path(scratch) / str(size))
            build(path, size)
            found[f"{size // 1000} kB"] = measure(path, given.reads * (10 if size < 10_000 else 1), given.rounds)
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": {name: number for name, number in versions().items() if name in ("lmdb", "numpy")},
        "reads": given.reads,
        "rounds": given.rounds,
    }
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "lmdb.json").write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
    lines = [
        f"Reads a second, all workers together (of CPU time in brackets), and the share of raw py-lmdb's, wall / CPU, medians of "
        f"{given.rounds} rounds in turn. {about['date']}, {about['machine']}; py-lmdb {about['versions']['lmdb']}.",
        "",
        "| value, workers | eagle | raw | raw, held | eagle / raw | eagle / held |",
        "|---|---|---|---|---|---|",
    ]
    for size, cells in found.items():
        for where in dict.fromkeys(" ".join(key.split(" ")[:2]) for key in cells):
            ours, raw, held = (cells[f"{where} {reader}"] for reader in READERS)
            rates = " | ".join(f"{c['reads_per_s']:,.0f} ({c['reads_per_cpu_s']:,.0f})" for c in (ours, raw, held))
            kind, number = where.split(" ")
            lines.append(
                f"| {size}, {number} {kind}{'' if number == '1' else 's' if kind == 'thread' else 'es'} | {rates} | "
                f"{ours['of_raw_wall']:.2f} / {ours['of_raw_cpu']:.2f} | "
                f"{ours['of_raw_wall'] / held['of_raw_wall']:.2f} / {ours['of_raw_cpu'] / held['of_raw_cpu']:.2f} |"
            )
    (given.results / "lmdb.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
