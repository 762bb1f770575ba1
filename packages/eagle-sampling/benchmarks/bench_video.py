"""Frames of long videos against the public readers: wall time, CPU time and memory, each cell in its own process.

    python bench_video.py run [--videos FOLDER] [--names 360p-10min,...] [--frames 8,64,512] [--readers eagle,...] [--repeat 2]
    python bench_video.py series [--budget SECONDS] [--fresh]   # the whole table, most informative cells first; resumable
    python bench_video.py table

Every reader returns uint8 RGB at 448 x 448 on two cores; rivals that are not installed are skipped. eagle and torchcodec are measured
alternately, several times; the others once. Every run is stored in `results/video.json` with the load of the machine (`others`: the share
of its cores that other programs used); `table` takes medians and writes `results/video.md` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from make_videos import FOLDER

RESULTS = Path(__file__).parent / "results"
SIDE = 448


def indices(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def eagle(path: str, count: int):
    from eagle_sampling import choose_times, probe, read_frames

    return lambda: read_frames(path, choose_times(probe(path).times, count), SIDE, workers=2).pixels.shape


def torchcodec(path: str, count: int, mode: str = "approximate", threads: int = 2):
    import torch
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    torch.set_num_threads(1)

    def run():
        decoder = VideoDecoder(path, seek_mode=mode, num_ffmpeg_threads=threads, transforms=[Resize((SIDE, SIDE))])
        return decoder.get_frames_at(indices(decoder.metadata.num_frames, count)).data.shape

    return run


def torchcodec_exact(path: str, count: int):
    return torchcodec(path, count, "exact", 1)


def decord(path: str, count: int):
    import decord as library

    def run():
        reader = library.VideoReader(path, width=SIDE, height=SIDE, num_threads=2)
        return reader.get_batch(indices(len(reader), count)).asnumpy().shape

    return run


def opencv(path: str, count: int):
    import cv2

    cv2.setNumThreads(2)

    def run():
        capture = cv2.VideoCapture(path)
        out = np.empty((count, SIDE, SIDE, 3), np.uint8)
        for row, index in enumerate(indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), count)):
            capture.set(cv2.CAP_PROP_POS_FRAMES, index)
            frame = capture.read()[1]
            out[row] = cv2.cvtColor(cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC), cv2.COLOR_BGR2RGB)
        return out.shape

    return run


def pyav(path: str, count: int):
    import av

    def run():
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


READERS = {
    "eagle": eagle,
    "torchcodec": torchcodec,
    "torchcodec-exact": torchcodec_exact,
    "decord2": decord,
    "opencv": opencv,
    "pyav": pyav,
}


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(reader: str, path: str, count: int) -> None:
    """One cell, printed as JSON. Memory: the highest resident size during the call, above that before it."""
    run = READERS[reader](path, count)
    before, peak, done = rss(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, rss())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    shape = run()
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    done = True
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    assert count in shape
    print(json.dumps({"wall": wall, "cpu": cpu, "memory": max(peak, rss()) - before}))


def run(arguments: argparse.Namespace) -> None:
    """The cells that the arguments name; their earlier results are replaced."""
    results = Results(Path(arguments.results))
    readers = arguments.readers.split(",")
    for name in arguments.names.split(","):
        for count in map(int, arguments.frames.split(",")):
            for reader in readers:
                results.cells.pop(f"{name} {count} {reader}", None)
            for _ in range(arguments.repeat):
                for reader in readers:
                    results.measure(arguments.videos, name, count, reader)


PAIR, RIVALS = ("eagle", "torchcodec"), ("torchcodec-exact", "decord2", "opencv", "pyav")
# (video, frames, readers, runs of each), the most telling first.
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
SLOWER = {"eagle": 1, "torchcodec": 2, "torchcodec-exact": 3, "decord2": 3.5, "opencv": 4, "pyav": 4}


def series(arguments: argparse.Namespace) -> None:
    """The missing cells of SERIES, until the budget would be exceeded."""
    file = Path(arguments.results) / "video.json"
    if arguments.fresh:
        file.unlink(missing_ok=True)
    results = Results(Path(arguments.results))
    end = time.monotonic() + arguments.budget
    took: dict[tuple[str, int], float] = {}  # eagle's time for a cell predicts that of the others
    for name, count, readers, runs in SERIES:
        if arguments.names and name not in arguments.names.split(","):
            continue
        for turn in range(runs):
            for reader in readers:
                known = results.cells.get(f"{name} {count} {reader}", [])
                if (name, count) not in took and (ours := results.cells.get(f"{name} {count} eagle")):
                    took[name, count] = min(cell["wall"] for cell in ours)
                if len(known) > turn or known == "failed":
                    continue
                if time.monotonic() + took.get((name, count), guess(name, count)) * SLOWER[reader] + 4 > end:
                    print("budget used; next:", name, count, reader)
                    return
                results.measure(arguments.videos, name, count, reader)
    print("complete")


def guess(name: str, count: int) -> float:
    """Seconds of eagle's cell, from the frames to decode (half a keyframe interval each, at most all)."""
    frames = min(125 * count, 1800 * int(name.split("-")[1].removesuffix("min")))
    return frames * (0.0028 if name.startswith("1080p") else 0.0003)


class Results:
    """`video.json`: cells are "video frames reader" -> a list of runs, or "failed"."""

    def __init__(self, folder: Path):
        self.file = folder / "video.json"
        self.cells: dict[str, list[dict[str, float]] | str] = json.loads(self.file.read_text())["cells"] if self.file.exists() else {}
        self.warm: set[str] = set()

    def measure(self, videos: str, name: str, count: int, reader: str) -> None:
        """One run in its own process, stored immediately."""
        path = str(Path(videos) / (name if "." in name else f"{name}.mp4"))
        if path not in self.warm:
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
            self.warm.add(path)
        before, used, began = busy(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "cell", reader, path, str(count)], capture_output=True, text=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
        own = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        key = f"{name} {count} {reader}"
        if done.returncode:
            print(key, "failed:", done.stderr.strip().splitlines()[-1:])
            self.cells[key] = "failed"
        else:
            cell = json.loads(done.stdout.splitlines()[-1])
            cell = {"wall": round(cell["wall"], 4), "cpu": round(cell["cpu"], 4), "memory": cell["memory"]}
            cell["others"] = round(max(0.0, busy() - before - own) / (wall * (os.cpu_count() or 1)), 3)
            print(key, cell, flush=True)
            runs = self.cells.setdefault(key, [])
            assert isinstance(runs, list)
            runs.append(cell)
        about = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "python": platform.python_version(),
            "versions": versions(),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"about": about, "cells": self.cells}, indent=1) + "\n")


def busy() -> float:
    """Seconds that all cores together have worked since the start of the machine."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, soft, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("av", "torch", "torchcodec", "decord2", "opencv-python-headless", "numpy", "pillow", "lmdb"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(folder: Path) -> None:
    data = json.loads((folder / "video.json").read_text())
    cells = {tuple(key.split(" ")): runs for key, runs in data["cells"].items() if runs != "failed"}
    rows = sorted({(name, int(count)) for name, count, _ in cells}, key=lambda row: (row[0].split("-")[0] != "360p", row))
    readers = [reader for reader in READERS if any(key[2] == reader for key in cells)]
    about = data["about"]
    others = [run["others"] for runs in cells.values() for run in runs if "others" in run]
    lines = [
        f"Frames to 448 x 448, medians; wall s / CPU s / extra memory MB. {about['date']}, {about['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + (f". Other programs had at most {100 * max(others):.0f} % of the machine during any run" if others else "")
        + ". Empty: not run. Ratios are medians over pairs of neighbouring runs, with the lowest and highest where there are several.",
        "",
        "| video | frames | "
        + " | ".join(readers)
        + " | torchcodec / eagle, wall | eagle / torchcodec, CPU | memory | fastest rival / eagle, wall |",
        "|" + "---|" * (len(readers) + 6),
    ]
    for name, count in rows:
        found = {reader: cells.get((name, str(count), reader), []) for reader in readers}
        shown = [
            f"{middle(runs, 'wall'):.2f} / {middle(runs, 'cpu'):.2f} / {middle(runs, 'memory') / 1e6:.0f}" if runs else ""
            for runs in found.values()
        ]
        ours, theirs = found.get("eagle", []), found.get("torchcodec", [])
        ratios = ["", "", "", ""]
        if ours and theirs:
            pairs = list(zip(ours, theirs))
            ratios[0] = spread([b["wall"] / a["wall"] for a, b in pairs])
            ratios[1] = spread([a["cpu"] / b["cpu"] for a, b in pairs])
            ratios[2] = f"{middle(ours, 'memory') / max(middle(theirs, 'memory'), 1):.2f}"
        rivals = [middle(runs, "wall") for reader, runs in found.items() if reader != "eagle" and runs]
        if ours and rivals:
            ratios[3] = f"{min(rivals) / middle(ours, 'wall'):.2f}"
        lines.append(f"| {name} | {count} | " + " | ".join(shown + ratios) + " |")
    (folder / "video.md").write_text("\n".join(lines) + "\n")
    plot(folder, rows, readers, cells)


def middle(runs: list[dict[str, float]], figure: str) -> float:
    return statistics.median(run[figure] for run in runs)


def spread(ratios: list[float]) -> str:
    text = f"{statistics.median(ratios):.2f}"
    return text if len(ratios) == 1 else f"{text} ({min(ratios):.2f}-{max(ratios):.2f})"


def plot(folder, rows, readers, cells) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for reader in readers:
            counts = [count for n, count in rows if n == name and (n, str(count), reader) in cells]
            points = sorted((count, middle(cells[(name, str(count), reader)], "cpu")) for count in counts)
            if points:
                axis.plot(*zip(*points), marker="o", label=reader, linewidth=2.5 if reader == "eagle" else 1)
        axis.set(title=name, xscale="log", yscale="log", xlabel="frames", ylabel="CPU s")
        axis.set_xticks([8, 64, 512], ["8", "64", "512"])
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "video.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "series", "table"])
    parser.add_argument("--videos", default=str(FOLDER))
    parser.add_argument("--names", default="")
    parser.add_argument("--frames", default="8,64,512")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--results", default=str(RESULTS))
    arguments = parser.parse_args()
    if arguments.verb == "table":
        table(Path(arguments.results))
    elif arguments.verb == "series":
        series(arguments)
    else:
        arguments.names = arguments.names or "360p-10min,360p-60min,1080p-10min"
        run(arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
