"""Frames of long videos against the public readers: wall time, CPU time and memory, each run in its own process.

    python packages/eagle-sampling/benchmarks/bench_video.py run --out FILE.json [--names 360p-10min,...] [--frames 8,64,512]
        [--readers ours,...] [--repeat 2] [--videos FOLDER]
    python packages/eagle-sampling/benchmarks/bench_video.py series --out FILE.json [--budget SECONDS] [--fresh]

`run` measures the named cells and replaces their earlier results. `series` measures the whole table, the most informative cells first; the
same command continues an unfinished one. Every reader returns uint8 RGB at 448 x 448 on two cores. Ours and torchcodec are measured
alternately, several times, the others once. Every run is stored in FILE.json at once, with the share of the machine's cores that other
programs used (`others`). Figures are medians; `of_ours` is the median over pairs of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from make_videos import FOLDER

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, ResultError, add_out, read, report, write
from benchmarks.rivals import Absent, Rival, load

BENCHMARK = "eagle-sampling/video"
PACKAGES = ("av", "torch", "torchcodec", "decord2", "opencv-python-headless", "numpy", "pillow")
METRICS = {
    "wall_s": Metric("s", "lower"),
    "cpu_s": Metric("s", "lower"),
    "memory_mb": Metric("MB", "lower"),
    "wall_of_ours": Metric("", "none"),
    "cpu_of_ours": Metric("", "none"),
    "most_used_by_others": Metric("share of cores", "none"),
}
SIDE = 448
Reader = Callable[[str, int], tuple[int, ...]]


def indices(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def ours(sampling: Any) -> Reader:
    def run(path: str, count: int) -> tuple[int, ...]:
        return sampling.read_frames(path, sampling.choose_times(sampling.probe(path).times, count), SIDE, workers=2).pixels.shape

    return run


def torchcodec(mode: str, threads: int) -> Callable[..., Reader]:
    def make(torch: Any, decoder: Any, resize: Any) -> Reader:
        torch.set_num_threads(1)

        def run(path: str, count: int) -> tuple[int, ...]:
            video = decoder(path, seek_mode=mode, num_ffmpeg_threads=threads, transforms=[resize((SIDE, SIDE))])
            return video.get_frames_at(indices(video.metadata.num_frames, count)).data.shape

        return run

    return make


def decord(library: Any) -> Reader:
    def run(path: str, count: int) -> tuple[int, ...]:
        reader = library.VideoReader(path, width=SIDE, height=SIDE, num_threads=2)
        return reader.get_batch(indices(len(reader), count)).asnumpy().shape

    return run


def opencv(cv2: Any) -> Reader:
    cv2.setNumThreads(2)

    def run(path: str, count: int) -> tuple[int, ...]:
        capture = cv2.VideoCapture(path)
        out = np.empty((count, SIDE, SIDE, 3), np.uint8)
        for row, index in enumerate(indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), count)):
            capture.set(cv2.CAP_PROP_POS_FRAMES, index)
            frame = capture.read()[1]
            out[row] = cv2.cvtColor(cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC), cv2.COLOR_BGR2RGB)
        return out.shape

    return run


def pyav(av: Any) -> Reader:
    def run(path: str, count: int) -> tuple[int, ...]:
        out = np.empty((count, SIDE, SIDE, 3), np.uint8)
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "AUTO", 2
            step = 1 / (stream.average_rate * stream.time_base)
            for row, index in enumerate(indices(stream.frames, count)):
                container.seek(int(index * step), stream=stream)
                for frame in container.decode(stream):
                    if frame.pts >= int(index * step):
                        out[row] = frame.reformat(SIDE, SIDE, "rgb24", interpolation="BICUBIC").to_ndarray()
                        break
        return out.shape

    return run


TORCHCODEC = ("torch", "torchcodec.decoders:VideoDecoder", "torchcodec.transforms:Resize")
READERS = {
    rival.name: rival
    for rival in (
        Rival("ours", ours, ("eagle_sampling",)),
        Rival("torchcodec", torchcodec("approximate", 2), TORCHCODEC),
        Rival("torchcodec-exact", torchcodec("exact", 1), TORCHCODEC),
        Rival("decord2", decord, ("decord",)),
        Rival("opencv", opencv, ("cv2",)),
        Rival("pyav", pyav, ("av",)),
    )
}


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(reader: str, path: str, count: int) -> None:
    """One run, printed as JSON. Memory: the highest resident size during the call, above that before it."""
    found, absent = load("", [READERS[reader]])
    if absent:
        print(json.dumps({"absent": absent[0].reason}))
        return
    before, peak, done = rss(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, rss())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    shape = found[reader](path, count)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    done = True
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    assert count in shape
    print(json.dumps({"wall": wall, "cpu": cpu, "memory": max(peak, rss()) - before}))


PAIR, RIVALS = ("ours", "torchcodec"), ("torchcodec-exact", "decord2", "opencv", "pyav")
# (video, frames, readers, runs of each), the most informative first.
SERIES = [
    *(
        (name, count, readers, runs)
        for name in ("360p-10min", "360p-60min")
        for count in (512, 64, 8)
        for readers, runs in ((PAIR, 7 if count == 512 else 3), (RIVALS, 1))
    ),
    ("1080p-10min", 64, PAIR, 3),
    ("1080p-10min", 512, PAIR, 2),
    *(("1080p-10min", count, readers, runs) for count, readers, runs in ((8, PAIR, 3), (8, RIVALS, 1), (64, RIVALS, 1))),
    *(("1080p-60min", count, readers, runs) for count, readers, runs in ((8, PAIR, 2), (8, RIVALS, 1), (64, PAIR, 1), (512, PAIR, 1))),
    *((name, count, RIVALS, 1) for name, count in (("1080p-60min", 64), ("1080p-10min", 512), ("1080p-60min", 512))),
]
SLOWER = {"ours": 1, "torchcodec": 2, "torchcodec-exact": 3, "decord2": 3.5, "opencv": 4, "pyav": 4}


def run(options: argparse.Namespace) -> None:
    """The cells that the options name; their earlier results are replaced."""
    runs = Runs(options.out)
    readers = options.readers.split(",")
    for name in options.names.split(","):
        for count in map(int, options.frames.split(",")):
            for reader in readers:
                runs.known.pop((cell(name, count), reader), None)
                runs.absent.pop((cell(name, count), reader), None)
            for _ in range(options.repeat):
                for reader in readers:
                    runs.measure(options.videos, name, count, reader)
    report(runs.result(), options.out)


def series(options: argparse.Namespace) -> None:
    """The missing cells of SERIES, until the budget would be exceeded."""
    if options.fresh:
        options.out.unlink(missing_ok=True)
    runs = Runs(options.out)
    end = time.monotonic() + options.budget
    names = options.names.split(",") if options.names else None
    for name, count, readers, times in SERIES:
        if names is not None and name not in names:
            continue
        for turn in range(times):
            for reader in readers:
                key = cell(name, count), reader
                if key in runs.absent or len(runs.known.get(key, [])) > turn:
                    continue
                # Our time for a cell predicts that of the others.
                measured = [one["wall"] for one in runs.known.get((cell(name, count), "ours"), [])]
                expected = min(measured) if measured else guess(name, count)
                if time.monotonic() + expected * SLOWER[reader] + 4 > end:
                    report(runs.result(), options.out)
                    print(f"budget used; next: {key[0]}, {reader}")
                    return
                runs.measure(options.videos, name, count, reader)
    report(runs.result(), options.out)


def cell(name: str, count: int) -> str:
    return f"{name}, {count} frames"


def guess(name: str, count: int) -> float:
    """Seconds of our cell, from the frames to decode (half a keyframe interval each, at most all)."""
    frames = min(125 * count, 1800 * int(name.split("-")[1].removesuffix("min")))
    return frames * (0.0028 if name.startswith("1080p") else 0.0003)


class Runs:
    """The runs of every cell and reader, stored in a result after each of them."""

    def __init__(self, out: Path) -> None:
        """Continues with the runs in `out`, if it exists. Raises ResultError if that is another benchmark's result."""
        self.out = out
        self.known: dict[tuple[str, str], list[dict[str, float]]] = {}
        self.absent: dict[tuple[str, str], str] = {}
        self.warm: set[str] = set()
        if out.exists():
            found = read(out)
            if found.benchmark != BENCHMARK:
                raise ResultError(f"{out}: a result of {found.benchmark}, expected one of {BENCHMARK}; choose another file")
            self.known = {(case.case, case.contender): case.details["runs"] for case in found.cases}
            self.absent = {(one.case, one.contender): one.reason for one in found.absent}

    def measure(self, videos: Path, name: str, count: int, reader: str) -> None:
        """One run in its own process, stored immediately."""
        path = str(videos / (name if "." in name else f"{name}.mp4"))
        if path not in self.warm:
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
            self.warm.add(path)
        key = cell(name, count), reader
        before, used, began = busy(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "cell", reader, path, str(count)], capture_output=True, text=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
        own = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        if done.returncode:
            self.absent[key] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
        elif "absent" in (answer := json.loads(done.stdout.splitlines()[-1])):
            self.absent[key] = answer["absent"]
        else:
            answer["others"] = round(max(0.0, busy() - before - own) / (wall * (os.cpu_count() or 1)), 3)
            self.known.setdefault(key, []).append(answer)
        print(*key, self.absent.get(key) or self.known[key][-1], flush=True)
        write(self.result(), self.out)

    def result(self) -> Result:
        result = Result(BENCHMARK, environment(PACKAGES), METRICS)
        for (case, reader), runs in self.known.items():
            figures = {
                "wall_s": middle(run["wall"] for run in runs),
                "cpu_s": middle(run["cpu"] for run in runs),
                "memory_mb": middle(run["memory"] / 1e6 for run in runs),
                "most_used_by_others": max(run["others"] for run in runs),
            }
            pairs = list(zip(runs, self.known.get((case, "ours"), [])))
            if pairs and reader != "ours":
                figures["wall_of_ours"] = middle(theirs["wall"] / our["wall"] for theirs, our in pairs)
                figures["cpu_of_ours"] = middle(theirs["cpu"] / our["cpu"] for theirs, our in pairs)
            result.add(case, reader, details={"runs": runs}, **figures)
        result.absent = [Absent(case, reader, reason) for (case, reader), reason in self.absent.items()]
        return result


def middle(values: Any) -> float:
    return statistics.median(values)


def busy() -> float:
    """CPU seconds of all cores since the start of the machine."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, soft, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "series"])
    parser.add_argument("--videos", type=Path, default=FOLDER, help=f"folder of the videos of make_videos.py (default: {FOLDER})")
    parser.add_argument("--names", default="", help="videos (default: 360p-10min,360p-60min,1080p-10min; of series: all)")
    parser.add_argument("--frames", default="8,64,512")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--fresh", action="store_true", help="delete FILE.json first")
    add_out(parser)
    options = parser.parse_args()
    if options.out is None:
        parser.error("--out FILE.json is required: every run is stored there")
    if unknown := set(options.readers.split(",")) - set(READERS):
        parser.error(f"unknown readers {', '.join(sorted(unknown))}; expected some of {', '.join(READERS)}")
    try:
        if options.verb == "series":
            series(options)
        else:
            options.names = options.names or "360p-10min,360p-60min,1080p-10min"
            run(options)
    except ResultError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(main())
