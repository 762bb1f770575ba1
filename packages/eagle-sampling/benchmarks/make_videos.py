"""Videos for the benchmarks: real x264 encodes (medium preset, GOP up to 250, B-frames) of moving, textured scenes with cuts.

A segment is encoded once and its packets are repeated to the wanted length, so an hour takes seconds; each repeat begins with an IDR frame.
Files go to a folder outside the repository (default: the system's temporary folder, `eagle-bench-videos`) and are kept.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 30
FOLDER = Path(tempfile.gettempdir()) / "eagle-bench-videos"


def scenes(count: int, width: int, height: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Camera pans over smooth random textures with two moving objects, a cut every 3-9 s, a little sensor noise. uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    noise = [rng.integers(-3, 4, (height, width, 1), dtype=np.int16) for _ in range(8)]
    shown = 0
    while shown < count:
        length = int(rng.integers(3 * FPS, 9 * FPS))
        big_w, big_h = int(width * 1.6), int(height * 1.6)
        layers = np.zeros((big_h, big_w, 3), np.float32)
        for cells, weight in ((6, 0.5), (24, 0.3), (120, 0.2)):
            grid = rng.integers(0, 256, (max(cells * height // width, 2), cells, 3), dtype=np.uint8)
            layers += weight * np.asarray(Image.fromarray(grid).resize((big_w, big_h), Image.Resampling.BICUBIC), np.float32)
        canvas = layers.astype(np.uint8)
        start, stop = rng.random((2, 2)) * (big_h - height, big_w - width)
        sprite = rng.integers(0, 256, (height // 5, width // 8, 3), dtype=np.uint8)
        sprite = np.asarray(Image.fromarray(sprite[::8, ::8]).resize((width // 8, height // 5), Image.Resampling.NEAREST))
        phase = rng.random(2) * 6.28
        for i in range(length):
            if shown == count:
                return
            y, x = (start + (stop - start) * i / length).astype(int)
            frame = canvas[y : y + height, x : x + width].astype(np.int16)
            for k in (0, 1):
                top = int((0.4 + 0.38 * np.sin(i / 23 + phase[k])) * (height - sprite.shape[0]))
                left = int((0.5 + 0.45 * np.cos(i / (31 + 9 * k) + phase[k])) * (width - sprite.shape[1]))
                frame[top : top + sprite.shape[0], left : left + sprite.shape[1]] = sprite
            yield np.clip(frame + noise[int(rng.integers(8))], 0, 255).astype(np.uint8)
            shown += 1


def encode(path: Path, seconds: int, width: int, height: int) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"preset": "medium", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 2
        for pixels in scenes(seconds * FPS, width, height):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        out.mux(stream.encode(None))


def repeat(segment: Path, path: Path, times: int, options: dict[str, str] | None = None) -> None:
    """`segment` repeated `times` times, packets copied; the suffix names the container."""
    partial = path.with_name("partial-" + path.name)
    with av.open(str(segment)) as source, av.open(str(partial), "w", options=options or {}) as out:
        video = source.streams.video[0]
        stream = out.add_stream_from_template(video)
        packets = [(p.pts, p.dts, p.is_keyframe, bytes(p)) for p in source.demux(video) if p.size]
        step = packets[1][1] - packets[0][1]
        for turn in range(times):
            for pts, dts, key, data in packets:
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, video.time_base
                packet.pts, packet.dts = pts + turn * step * len(packets), dts + turn * step * len(packets)
                packet.is_keyframe = key
                packet.duration = step
                out.mux(packet)
    partial.rename(path)


def make(folder: Path = FOLDER, only: Sequence[str] | None = None) -> Path:
    """The benchmark videos (all, or those named in `only`) that are missing are made; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, height, seconds in (("360p", 640, 360, 100), ("1080p", 1920, 1080, 50)):
        if only is not None and not any(file.startswith(name) for file in only):
            continue
        segment = folder / f"segment-{name}.mp4"
        if not segment.exists():
            encode(segment.with_name("partial-" + segment.name), seconds, width, height)
            segment.with_name("partial-" + segment.name).rename(segment)
        for minutes in (10, 60):
            suffixes = ["mp4", "mkv", "ts", "frag.mp4"] if name == "360p" else ["mp4"]
            for suffix in suffixes:
                path = folder / f"{name}-{minutes}min.{suffix}"
                if not path.exists() and (only is None or path.name in only):
                    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"} if suffix == "frag.mp4" else None
                    repeat(segment, path, minutes * 60 // seconds, options)
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
