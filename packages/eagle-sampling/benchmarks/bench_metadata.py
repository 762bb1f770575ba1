"""Video headers and image sizes on one core, against PyAV, torchcodec and Pillow in the same run.

python packages/eagle-sampling/benchmarks/bench_metadata.py [--videos FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from make_videos import FOLDER
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.rivals import Rival, load
from benchmarks.timing import interleaved_seconds
from eagle_sampling import image_size, probe

METRICS = {"cpu_ms": Metric("ms", "lower"), "files_per_s": Metric("files/s", "higher")}
PACKAGES = ("av", "torch", "torchcodec", "numpy", "pillow")


def best(work: Callable[[], object], turns: int) -> float:
    """CPU milliseconds of the fastest of `turns` calls (wall time on a shared machine depends on other programs)."""
    return 1000 * min(interleaved_seconds({"": work}, turns, warmup=0, clock=time.process_time)[""])


def demux(path: str) -> None:
    with av.open(path) as container:
        for _ in container.demux(video=0):
            pass


def torchcodec(mode: str) -> Rival:
    def make(decoder: Any) -> Callable[[str], object]:
        return lambda path: decoder(path, seek_mode=mode)

    return Rival(f"torchcodec {mode}", make, ("torchcodec.decoders:VideoDecoder",))


def videos(result: Result, folder: Path) -> None:
    for suffix in ("mp4", "frag.mp4", "mkv", "ts"):
        path = str(folder / f"360p-60min.{suffix}")
        case = f"60 min {suffix}"
        runs: list[tuple[str, str, Callable[[str], object], int]] = [
            (f"{case}, exact times", "ours", probe, 9),
            (f"{case}, exact times", "PyAV demux", demux, 1),
            (f"{case}, header only", "PyAV open", lambda path: av.open(path).close(), 3),
        ]
        if suffix == "mkv":
            runs.append((f"{case}, header only", "ours", lambda path: probe(path, exact=False), 9))
        if suffix == "mp4":
            found, absent = load(case, [torchcodec("exact"), torchcodec("approximate")])
            result.absent += absent
            runs += [(f"{case}, exact times", name, run, 2) for name, run in found.items()]
        for label, contender, run, turns in runs:
            result.add(label, contender, cpu_ms=best(lambda path=path, run=run: run(path), turns))


def images(result: Result, folder: Path) -> None:
    """Files per second: 640 x 480 pictures, JPEG with EXIF orientation."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        paths = [str(folder / f"{i}.{form.lower()}") for i in range(500)]
        out = io.BytesIO()
        picture.save(out, form, **({"exif": exif} if form == "JPEG" else {}))
        for path in paths:
            Path(path).write_bytes(out.getvalue())

        def ours(paths: list[str] = paths) -> None:
            for path in paths:
                image_size(path)

        def pillow(paths: list[str] = paths) -> None:
            for path in paths:
                with Image.open(path) as image:
                    image.getexif().get(0x0112)

        result.add(f"{form}, size", files_per_s=500_000 / best(ours, 7))
        result.add(f"{form}, size", "Pillow open + EXIF", files_per_s=500_000 / best(pillow, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, default=FOLDER, help=f"folder of the videos of make_videos.py (default: {FOLDER})")
    add_out(parser)
    options = parser.parse_args()
    if not options.videos.is_dir():
        parser.error(f"--videos {options.videos} is not a folder; make the videos with make_videos.py")
    result = Result("eagle-sampling/metadata", environment(PACKAGES), METRICS)
    videos(result, options.videos)
    with tempfile.TemporaryDirectory() as scratch:
        images(result, Path(scratch))
    report(result, options.out)


if __name__ == "__main__":
    main()
