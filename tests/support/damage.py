"""Damaged media: small images, videos and documents with bytes flipped, overwritten, cut off, repeated, or in a foreign file's name."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.media import grey_frames, random_image, write_video

_IMAGES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "jp2": "JPEG2000", "ppm": "PPM"}
_VIDEOS = ("mp4", "mkv", "ts", "avi", "flv", "mov")


def whole_media(folder: Path) -> list[tuple[str, bytes]]:
    """(suffix, content) of one small file of each kind."""
    found = []
    for suffix, kind in _IMAGES.items():
        out = io.BytesIO()
        random_image(1, (8, 6)).resize((96, 64)).save(out, kind)
        found.append((suffix, out.getvalue()))
    pages = [random_image(seed, (8, 6)).resize((64, 48)) for seed in range(4)]
    out = io.BytesIO()
    pages[0].save(out, "PDF", save_all=True, append_images=pages[1:])
    found.append(("pdf", out.getvalue()))
    for suffix in _VIDEOS:
        path = write_video(folder / f"whole.{suffix}", grey_frames(24, 8), options={"preset": "ultrafast", "g": "8"})
        found.append((suffix, path.read_bytes()))
        path.unlink()
    return found


def _flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    changed[rng.integers(0, len(data), int(rng.integers(1, 9)))] ^= np.uint8(1) << rng.integers(0, 8, dtype=np.uint8)
    return changed.tobytes()


def _header_flipped(data: bytes, rng: np.random.Generator) -> bytes:
    return _flipped(data[:200], rng) + data[200:]


def _overwritten(data: bytes, rng: np.random.Generator) -> bytes:
    at, size = int(rng.integers(0, len(data))), int(rng.integers(1, 400))
    return data[:at] + rng.bytes(size) + data[at + size :]


def _zeroed(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(data)))
    return data[:at] + bytes(len(data) - at)


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def _missing_part(data: bytes, rng: np.random.Generator) -> bytes:
    at, size = int(rng.integers(0, len(data))), int(rng.integers(1, 2000))
    return data[:at] + data[at + size :]


def _repeated(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(data)))
    return data[:at] + data[at // 2 :]


DAMAGES: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    _flipped,
    _header_flipped,
    _overwritten,
    _zeroed,
    _cut,
    _missing_part,
    _repeated,
)


def write_damaged(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """`count` files in `folder`, each of a random kind with one random damage; a tenth have another kind's name. The same for a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    media = whole_media(folder)
    paths = []
    for number in range(count):
        suffix, data = media[int(rng.integers(len(media)))]
        damaged = DAMAGES[int(rng.integers(len(DAMAGES)))](data, rng)
        if rng.random() < 0.1:
            suffix = media[int(rng.integers(len(media)))][0]
        paths.append(folder / f"{number:05d}.{suffix}")
        paths[-1].write_bytes(damaged)
    return paths


def row_of(path: Path) -> dict[str, object]:
    """A row with one question about the file, as an image or a video by its name."""
    kind = "image" if path.suffix[1:] in _IMAGES else "video"
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A square."}]
    return {"conversations": turns, kind: path.name}
