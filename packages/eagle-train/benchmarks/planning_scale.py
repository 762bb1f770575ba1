"""Planning of many rows by the ranks of one host: seconds from prepared parts to a schedule on every rank, and memory.

    python packages/eagle-train/benchmarks/planning_scale.py [MILLIONS] [--ranks 2] [--out FILE.json]

Synthetic facts in parts of 2048 rows, 256 different ones: a third text, a third single images, a sixth three images, a sixth videos of 30
seconds; sizes are random. The ranks are processes that start at the same time. Memory is that of all ranks together, sampled 20 times a
second: `anonymous` is what processes have for themselves; files that are mapped can be dropped and read again, and are there once.
`cpu_seconds`: of all threads of all ranks; on a machine that others use it says more than `seconds`.
"""

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_model.prompt.costs import FrameCosts
from eagle_model.visual import VisualSpec
from eagle_sampling import TimeTable
from eagle_train.config import Source, parse_config
from eagle_train.data.facts import SCHEMA, content_of
from eagle_train.data.join import Part, Prepared, join_sources
from eagle_train.data.keys import RowFormat
from eagle_train.executors import cpus
from eagle_train.planning.stages import StageSchedule

ROWS, DIFFERENT = 2048, 256
STAGES = (32768, 131072)
METRICS = {
    "seconds": Metric("s", "lower"),
    "cpu_seconds": Metric("s", "lower"),
    "rows_per_s": Metric("", "higher"),
    "anonymous_GiB": Metric("GiB", "lower"),
    "file_GiB": Metric("GiB", "lower"),
}
COSTS = FrameCosts(tuple(tuple(14 + row + column for column in range(8)) for row in range(8)))


def part_table(seed: int) -> pa.Table:
    """Facts of one shard."""
    rng = np.random.default_rng(seed)
    kind = np.arange(ROWS) % 6
    images = np.take((0, 0, 1, 1, 3, 0), kind)
    ends = [np.concatenate([[0], np.cumsum(counts)]).astype(np.int32) for counts in (images, kind == 5)]
    videos = int(ends[1][-1])

    def listed(values: object, which: int = 1, kind: pa.DataType | None = None) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(ends[which]), pa.array(values, kind))

    sizes = rng.integers(100, 3000, (2, images.sum())).astype(np.int32)
    times = TimeTable.from_ticks(range(300), Fraction(1, 10)).to_list()
    columns = {
        "line": np.arange(ROWS),
        "offset": np.arange(ROWS) * 200,
        "size": np.full(ROWS, 199),
        "text_tokens": rng.integers(50, 800, ROWS).astype(np.int32),
        "label_tokens": np.full(ROWS, 40, np.int32),
        "media_group": np.zeros(ROWS, np.int64),
        "image_width": listed(sizes[0], 0),
        "image_height": listed(sizes[1], 0),
        "video_frames": listed(np.full(videos, 300, np.int32)),
        "video_seconds": listed(np.full(videos, 30.0)),
        "video_last_time": listed(np.full(videos, 29.9)),
        "video_start": listed([None] * videos, kind=pa.float64()),
        "video_end": listed([None] * videos, kind=pa.float64()),
        "video_fps": listed([None] * videos, kind=pa.float64()),
        "video_width": listed(np.full(videos, 640, np.int32)),
        "video_height": listed(np.full(videos, 360, np.int32)),
        "video_times": listed([times] * videos),
    }
    return pa.table(columns, schema=SCHEMA)


def facts_of(folder: Path, parts: int):
    """The joined facts of `parts` parts, which are written when they are not there."""
    names = [folder / f"part-{number}.parquet" for number in range(min(parts, DIFFERENT))]
    for number, name in enumerate(names):
        if not name.exists():
            pq.write_table(part_table(number), name, compression="zstd")
    config = parse_config(settings(), base=folder)
    listed = [Part(names[number % DIFFERENT], 1 + number * ROWS, number * ROWS * 200) for number in range(parts)]
    content = content_of(part_table(0))
    source = Source(annotation=folder / "rows.jsonl")
    one = Prepared("all", source, (), RowFormat(), "", parts * ROWS, 0, content, listed)
    return config, join_sources(config, [one], COSTS, "key")


def settings() -> dict:
    stages = [{"name": f"{tokens >> 10}K", "max_tokens": tokens} for tokens in STAGES]
    return {"run": {"name": "scale", "dir": "runs"}, "data": {"sources": {"all": {"annotation": "rows.jsonl"}}}, "stages": stages}


def rank(folder: str, parts: int, start, results) -> None:
    """One rank: facts and the schedule of every stage, once all ranks are there."""
    start.wait()
    for index in range(len(STAGES)):
        begin, used = time.perf_counter(), time.process_time()
        config, facts = facts_of(Path(folder), parts)
        schedule = StageSchedule(facts, config, config.stages[index], VisualSpec(), folder=config.facts_folder / "plans")
        plan = schedule.plan(0)
        assert sum(len(plan.rows_of(pack)) for pack in (0, plan.packs - 1)) > 0
        results.put((time.perf_counter() - begin, time.process_time() - used, plan.packs))
        start.wait()


def join(folder: str, parts: int, results) -> None:
    """The joined facts, made."""
    begin, used = time.perf_counter(), time.process_time()
    facts_of(Path(folder), parts)
    results.put((time.perf_counter() - begin, time.process_time() - used))


class Memory:
    """The most that processes have for themselves, together."""

    def __init__(self, processes: list[int]) -> None:
        self.most, self.processes, self.running = 0, processes, True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def _sample(self) -> None:
        while self.running:
            total = 0
            for process in self.processes:
                try:
                    status = Path(f"/proc/{process}/status").read_text()
                except OSError:
                    continue
                total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
            self.most = max(self.most, total << 10)
            time.sleep(0.05)

    def stop(self) -> float:
        self.running = False
        self.thread.join()
        return self.most / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("millions", nargs="?", type=float, default=2.0, metavar="MILLIONS", help="default: 2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help="where files are made; default: a temporary folder")
    add_out(parser)
    options = parser.parse_args()
    parts = max(int(options.millions * 1e6) // ROWS, 1)
    rows = parts * ROWS
    result = Result(
        "eagle-train/planning_scale",
        environment(("numpy", "pyarrow")),
        METRICS,
        settings={"rows": rows, "ranks": options.ranks, "cpus": cpus()},
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        (Path(name) / "rows.jsonl").write_text("")
        begin = time.perf_counter()
        config, _ = facts_of(Path(name), 1)  # the different parts are written outside of what is timed
        for number in range(DIFFERENT):
            pq.write_table(part_table(number), Path(name) / f"part-{number}.parquet", compression="zstd")
        print(f"{rows} rows; parts written in {time.perf_counter() - begin:.1f} s")
        context = multiprocessing.get_context("spawn")
        start, results = context.Barrier(options.ranks + 1), context.Queue()
        joining = context.Process(target=join, args=(name, parts, results))
        joining.start()
        memory = Memory([joining.pid or 0])
        seconds, used = results.get()
        joining.join()
        size = max(file.stat().st_size for file in config.facts_folder.glob("joined/*.arrow")) / 2**30
        result.add("parts joined", seconds=seconds, cpu_seconds=used, rows_per_s=rows / seconds, anonymous_GiB=memory.stop(), file_GiB=size)
        ranks = [context.Process(target=rank, args=(name, parts, start, results)) for _ in range(options.ranks)]
        for process in ranks:
            process.start()
        before: set[Path] = set()
        for tokens in STAGES:
            memory = Memory([process.pid or 0 for process in ranks])
            start.wait()
            done = [results.get() for _ in ranks]
            seconds = max(seconds for seconds, _, _ in done)
            files = set(config.facts_folder.glob("plans/*.plan"))
            size, before = sum(file.stat().st_size for file in files - before), files
            result.add(
                f"schedule of a stage of {tokens} tokens, {options.ranks} ranks",
                details={"packs": done[0][2]},
                seconds=seconds,
                cpu_seconds=sum(used for _, used, _ in done),
                rows_per_s=rows / seconds,
                anonymous_GiB=memory.stop(),
                file_GiB=size / 2**30,
            )
        start.wait()
        for process in ranks:
            process.join()
    report(result, options.out)


if __name__ == "__main__":
    main()
