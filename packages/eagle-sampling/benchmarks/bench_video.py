"""Frames of long videos against the public readers: wall time, CPU time and memory, each cell in a process of its own.

    python bench_video.py run [--videos FOLDER] [--names 360p-10min,...] [--frames 8,64,512] [--readers eagle,...] [--repeat 2]
    python bench_video.py table

Every reader gives uint8 RGB at 448 x 448 on two cores; rivals that aren't installed are left out. Results are merged into
`results/video.json` (one entry per reader, video and count; a new run replaces it); `table` writes `results/video.md` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

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


def sweep(arguments: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "video.json"
    cells = json.loads(file.read_text())["cells"] if file.exists() else {}
    for name in arguments.names.split(","):
        path = str(Path(arguments.videos) / (name if "." in name else f"{name}.mp4"))
        Path(path).read_bytes()  # warm cache
        for count in map(int, arguments.frames.split(",")):
            for turn in range(arguments.repeat):
                for reader in arguments.readers.split(","):
                    command = [sys.executable, __file__, "cell", reader, path, str(count)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        print(name, count, reader, "failed:", done.stderr.strip().splitlines()[-1:])
                        continue
                    result = json.loads(done.stdout.splitlines()[-1])
                    key = f"{name} {count} {reader}"
                    if turn == 0 or result["wall"] < cells[key]["wall"]:
                        cells[key] = result
                    print(key, {k: round(v, 3) for k, v in result.items()}, flush=True)
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"2 cores, {platform.machine()}, shared with other work",
        "python": platform.python_version(),
        "versions": versions(),
    }
    file.write_text(json.dumps({"about": about, "cells": cells}, indent=1) + "\n")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("av", "torch", "torchcodec", "decord2", "opencv-python-headless", "numpy", "pillow", "lmdb"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table() -> None:
    data = json.loads((RESULTS / "video.json").read_text())
    cells = {tuple(key.split(" ")): value for key, value in data["cells"].items()}
    rows = list(dict.fromkeys((name, int(count)) for name, count, _ in cells))
    readers = [reader for reader in READERS if any(key[2] == reader for key in cells)]
    about = data["about"]
    lines = [
        f"Frames to 448 x 448, best of the runs; wall s / CPU s / extra memory MB. {about['date']}, {about['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + ".",
        "",
        "| video | frames | " + " | ".join(readers) + " | torchcodec / eagle, wall | eagle / torchcodec, CPU | memory |",
        "|" + "---|" * (len(readers) + 5),
    ]
    for name, count in rows:
        shown, pair = [], {}
        for reader in readers:
            cell = cells.get((name, str(count), reader))
            shown.append(f"{cell['wall']:.2f} / {cell['cpu']:.2f} / {cell['memory'] / 1e6:.0f}" if cell else "")
            pair[reader] = cell
        ours, theirs = pair.get("eagle"), pair.get("torchcodec")
        ratios = ["", "", ""]
        if ours and theirs:
            ratios = [
                f"{theirs['wall'] / ours['wall']:.2f}",
                f"{ours['cpu'] / theirs['cpu']:.2f}",
                f"{ours['memory'] / max(theirs['memory'], 1):.2f}",
            ]
        lines.append(f"| {name} | {count} | " + " | ".join(shown + ratios) + " |")
    (RESULTS / "video.md").write_text("\n".join(lines) + "\n")
    plot(rows, readers, cells)


def plot(rows, readers, cells) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for reader in readers:
            counts = [count for n, count in rows if n == name and (n, str(count), reader) in cells]
            points = sorted((count, cells[(name, str(count), reader)]["cpu"]) for count in counts)
            if points:
                axis.plot(*zip(*points), marker="o", label=reader, linewidth=2.5 if reader == "eagle" else 1)
        axis.set(title=name, xscale="log", yscale="log", xlabel="frames", ylabel="CPU s")
        axis.set_xticks([8, 64, 512], ["8", "64", "512"])
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "video.png", dpi=90)


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["table"]:
        table()
    else:
        from make_videos import FOLDER

        parser = argparse.ArgumentParser()
        parser.add_argument("verb", choices=["run"])
        parser.add_argument("--videos", default=str(FOLDER))
        parser.add_argument("--names", default="360p-10min,360p-60min,1080p-10min")
        parser.add_argument("--frames", default="8,64,512")
        parser.add_argument("--readers", default=",".join(READERS))
        parser.add_argument("--repeat", type=int, default=2)
        sweep(parser.parse_args())
