"""Headers, image sizes and LMDB reads on one core, against PyAV, torchcodec, Pillow and raw py-lmdb in the same run.

python bench_metadata.py [--videos FOLDER]       writes results/metadata.json and .md
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import av
import lmdb
import numpy as np
from bench_video import RESULTS, versions
from make_videos import FOLDER
from PIL import Image

from eagle_sampling import image_size, lmdb_store, probe


def best(work: Callable[[], object], turns: int) -> float:
    """CPU milliseconds of the quickest of `turns` calls (wall time on a shared machine says more about the neighbours)."""
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
    """Files a second: 640 x 480 pictures, JPEG with EXIF orientation."""
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


def stores(folder: Path) -> list[tuple[str, float]]:
    """Reads of 100 kB values a second, all threads together."""
    path = str(folder / "store")
    rng = np.random.default_rng(0)
    with lmdb.open(path, map_size=1 << 30) as environment, environment.begin(write=True) as transaction:
        for i in range(1000):
            transaction.put(b"%04d" % i, rng.bytes(100_000))
    order = rng.permutation(1000).tolist()
    keys, raw_keys = [f"{i:04d}" for i in order], [b"%04d" % i for i in order]

    def ours() -> None:
        for key in keys:
            lmdb_store.get(path, key)

    def together(work: Callable[[], None], threads: int) -> float:
        def go() -> None:
            crew = [threading.Thread(target=work) for _ in range(threads)]
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()

        return threads * 1_000_000 / best(go, 9)

    rows = [(f"LMDB, {n} threads: eagle, reads/s of CPU", together(ours, n)) for n in (1, 4)]
    lmdb_store.close_all()
    environment = lmdb.open(path, readonly=True, lock=False, readahead=False)

    def raw() -> None:
        for key in raw_keys:
            with environment.begin() as transaction:
                transaction.get(key)

    return rows + [(f"LMDB, {n} threads: raw py-lmdb, reads/s of CPU", together(raw, n)) for n in (1, 4)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", default=str(FOLDER))
    folder = Path(parser.parse_args().videos)
    with tempfile.TemporaryDirectory() as scratch:
        found = {"videos, CPU ms": videos(folder), "images": images(Path(scratch)), "lmdb": stores(Path(scratch))}
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"one core of {platform.machine()}, shared with other work",
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "metadata.json").write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
    lines = [f"{about['date']}, {about['machine']}; " + ", ".join(f"{n} {v}" for n, v in about["versions"].items()) + ".", ""]
    for title, rows in found.items():
        lines += [f"| {title} | |", "|---|---|", *(f"| {name} | {value:,.2f} |" for name, value in rows), ""]
    (RESULTS / "metadata.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
