"""Video headers and image sizes on one core, against PyAV, torchcodec and Pillow in the same run.

python bench_metadata.py [--videos FOLDER]       writes results/metadata.json and .md
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import av
import numpy as np
from bench_video import RESULTS, versions
from make_videos import FOLDER
from PIL import Image

from eagle_sampling import image_size, probe


def best(work: Callable[[], object], turns: int) -> float:
    """CPU milliseconds of the fastest of `turns` calls (wall time on a shared machine depends on other programs)."""
    times = []
    for _ in range(turns):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return 1000 * min(times)


def demux(path: str) -> None:
    with av.open(path) as container:
        for _ in container.demux(video=0):
            pass


def open_only(path: str) -> None:
    av.open(path).close()


def videos(folder: Path) -> list[tuple[str, float]]:
    rows = []
    for suffix in ("mp4", "frag.mp4", "mkv", "ts"):
        path = str(folder / f"360p-60min.{suffix}")
        rows.append((f"60 min {suffix}: eagle probe, exact times", best(lambda p=path: probe(p), 9)))
        if suffix == "mkv":
            rows.append((f"60 min {suffix}: eagle probe, header only", best(lambda p=path: probe(p, exact=False), 9)))
        rows.append((f"60 min {suffix}: PyAV open (no times)", best(lambda p=path: open_only(p), 3)))
        rows.append((f"60 min {suffix}: PyAV demux (times)", best(lambda p=path: demux(p), 1)))
        try:
            from torchcodec.decoders import VideoDecoder
        except ImportError:
            continue
        for mode in ("exact", "approximate") if suffix == "mp4" else ():
            rows.append((f"60 min {suffix}: torchcodec {mode}", best(lambda p=path, m=mode: VideoDecoder(p, seek_mode=m), 2)))
    return rows


def images(folder: Path) -> list[tuple[str, float]]:
    """Files per second: 640 x 480 pictures, JPEG with EXIF orientation."""
    rows = []
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        paths = [str(folder / f"{i}.{form.lower()}") for i in range(500)]
        out = io.BytesIO()
        picture.save(out, form, **({"exif": exif} if form == "JPEG" else {}))
        for path in paths:
            Path(path).write_bytes(out.getvalue())
        rows.append((f"{form}: eagle image_size, files/s", 500_000 / best(lambda paths=paths: [image_size(path) for path in paths], 7)))

        def pillow(paths: list[str] = paths) -> None:
            for path in paths:
                with Image.open(path) as image:
                    image.getexif().get(0x0112)

        rows.append((f"{form}: Pillow open + EXIF, files/s", 500_000 / best(pillow, 3)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", default=str(FOLDER))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    folder = Path(given.videos)
    with tempfile.TemporaryDirectory() as scratch:
        found = {"videos, CPU ms": videos(folder), "images": images(Path(scratch))}
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"one core of {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": versions(),
    }
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "metadata.json").write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
    lines = [f"{about['date']}, {about['machine']}; " + ", ".join(f"{n} {v}" for n, v in about["versions"].items()) + ".", ""]
    for title, rows in found.items():
        lines += [f"| {title} | |", "|---|---|", *(f"| {name} | {value:,.2f} |" for name, value in rows), ""]
    (given.results / "metadata.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
