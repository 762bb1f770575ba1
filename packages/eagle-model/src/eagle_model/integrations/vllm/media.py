"""Media of a request in the forms in which vLLM passes them, as references of `eagle_model.visual`.

Nothing is decoded here. Which frames of a video are read depends on the token budget of the whole prompt, so the video loader keeps the
bytes, and the processor reads the chosen frames (`eagle_sampling.read_frames`).
"""

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from eagle_model.arguments import OF_IMAGES, OF_VIDEOS
from eagle_model.integrations.vllm import NAME
from eagle_model.prompt import PromptError
from eagle_tiling.color import exif_orientation

_ENCODED = "encoded"
#: What a request may say about a medium. Other fields of a reference name files, and a request names files only where vLLM checks them.
SETTINGS = {"image": OF_IMAGES, "video": (*OF_VIDEOS, "nframes", "start", "end", "start_time", "end_time", "times")}


def check_settings(kind: str, settings: Iterable[str]) -> None:
    """Raises PromptError for a setting that a medium of a request can't have."""
    if unknown := sorted(set(settings) - set(SETTINGS[kind])):
        name = "an image" if kind == "image" else "a video"
        raise PromptError(f"{name} has no setting {unknown[0]}; it can have {', '.join(SETTINGS[kind])}")


@VIDEO_LOADER_REGISTRY.register(NAME)
class EncodedVideo(VideoLoader):
    """Passes the bytes of a video or PDF on; its options are those of a single video (fps, num_frames, start, end, ...)."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """data: a file. num_frames: exactly so many frames; -1: as the sampling rate says."""
        check_settings("video", kwargs)
        settings = kwargs | ({} if num_frames == -1 else {"num_frames": num_frames})
        return np.empty((0, 0, 0, 3), np.uint8), {_ENCODED: True, "settings": settings}


@dataclass
class Medium:
    """ref: what `load_image` or `as_video` takes, with settings of this medium. digest: of its content and settings.

    file: temporary file that `ref` names; it exists as long as this object.
    """

    ref: Any
    digest: bytes
    file: Any = field(default=None, repr=False)


class EagleItems(ProcessorBatchItems[Medium]):
    """The images or videos of one request."""


class EagleDataParser(MultiModalDataParser):
    """Accepts what vLLM's connector gives, and in `LLM.generate` all forms that `EagleProcessor` accepts (paths, mappings with `start`,
    `end`, `fps`, `max_tiles`; lists of frames)."""

    def _parse_image_data(self, data: Any) -> EagleItems | None:  # type: ignore[override]
        if data is None:
            return None
        many = isinstance(data, list | tuple) or (hasattr(data, "ndim") and data.ndim == 4)
        return EagleItems([_image(item) for item in (data if many else [data])], "image")

    def _parse_video_data(self, data: Any) -> EagleItems | None:  # type: ignore[override]
        if data is None:
            return None
        pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Mapping)
        frames = isinstance(data, list | tuple) and all(_is_picture(item) for item in data)
        many = isinstance(data, list | tuple) and not pair and not frames
        return EagleItems([_video(item) for item in (data if many else [data])], "video")


def _image(item: Any) -> Medium:
    settings: dict[str, Any] = {}
    if isinstance(item, Mapping):
        settings = dict(item)
        item = settings.pop("image", None)
    if item is None:
        raise PromptError("an image is empty; a cached image cannot be named by its uuid alone, send it again")
    if isinstance(item, MediaWithBytes):
        content: Iterable[bytes] = [item.original_bytes]
        item = item.media if _decoded_alike(item) else item.original_bytes
    else:
        content = [item] if isinstance(item, bytes) else _contents([item])
    return Medium({"image": item, **settings} if settings else item, _digest(content, settings))


def _decoded_alike(item: MediaWithBytes[Image.Image]) -> bool:
    """Whether vLLM decoded an image to the pixels that Eagle would decode from its bytes, so that it need not be decoded again.

    vLLM decodes before the plugin sees a request, on several threads; the media processor runs on one. True for JPEG, PNG and WebP in RGB
    (vLLM converts other modes and transparency in its own way) that both turn in the same way: Pillow, which vLLM asks, also follows XMP
    and EXIF in a PNG's text.
    """
    data = item.original_bytes
    if item.io_config is not None or item.media.mode != "RGB" or "transparency" in item.media.info:
        return False
    if data.startswith(b"\x89PNG"):  # its EXIF may follow the pixels, so only a decoded image has all of it
        return not any(name in item.media.info for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))
    if not data.startswith((b"\xff\xd8", b"RIFF")):
        return False
    try:
        with Image.open(BytesIO(data), formats=("JPEG", "WEBP")) as header:
            turned = header.getexif().get(ExifTags.Base.Orientation, 1)
            return turned == exif_orientation(header.info.get("exif", b""))
    except Exception:  # damaged metadata make Pillow raise exceptions of many types
        return False


def _video(item: Any) -> Medium:
    settings: dict[str, Any] = {}
    if isinstance(item, Mapping):
        settings = dict(item)
        name = next((name for name in ("video", "path", "frames") if settings.get(name) is not None), "video")
        item = settings.pop(name, None)
    if item is None:
        raise PromptError("a video is empty; a cached video cannot be named by its uuid alone, send it again")
    data: bytes | None = None
    if isinstance(item, MediaWithBytes):
        data, item = item.original_bytes, item.media
    metadata: Mapping[str, Any] = {}
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping):
        item, metadata = item
    if metadata.get(_ENCODED):
        assert data is not None
        settings = dict(metadata["settings"]) | settings
        file = tempfile.NamedTemporaryFile(prefix="eagle-", suffix=".pdf" if data.startswith(b"%PDF") else ".mp4")  # noqa: SIM115
        file.write(data)
        file.flush()
        return Medium({**settings, "video": file.name}, _digest([data], settings), file)
    if isinstance(item, str | PathLike):
        path = Path(str(item).removeprefix("file://"))
        if not path.is_file():
            raise PromptError(f"{path}: there is no such video file")
        return Medium({"video": str(path), **settings}, _digest([_file_digest(path)], settings))
    if rate := metadata.get("fps"):
        numbers = metadata.get("frames_indices") or range(len(item))
        settings = {"times": [number / rate for number in numbers]} | settings
    frames = list(item)
    return Medium({"frames": frames, **settings}, _digest(_contents(frames), settings))


def _file_digest(path: Path) -> bytes:
    """Of a file that may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _is_picture(item: Any) -> bool:
    return isinstance(item, Image.Image) or getattr(item, "ndim", None) == 3


def _contents(pictures: Sequence[Any]) -> Iterable[bytes]:
    for picture in pictures:
        if isinstance(picture, str | PathLike):
            yield str(picture).encode()
            if not str(picture).startswith("data:"):
                yield Path(str(picture).removeprefix("file://")).read_bytes()
            continue
        pixels = np.asarray(picture)
        yield repr((pixels.shape, pixels.dtype.str)).encode()
        yield np.ascontiguousarray(pixels).tobytes()


def _digest(contents: Iterable[bytes], settings: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()
