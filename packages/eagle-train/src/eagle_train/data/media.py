"""References to media in rows, in all spellings, with their paths made absolute.

An image is a path, bytes, a value of an LMDB or a member of a tar file; a video is a file, a part of it, or a list of images; a document is
a PDF or a list of pages.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from eagle_model.visual import VideoRef
from eagle_sampling import Limits, MediaError, read_bytes
from eagle_sampling.files import is_remote
from eagle_train.config import addresses

from .atomic import replacing
from .clips import ENDS, RANGES, RATES, STARTS, bounds, rate_of
from .errors import RowError
from .files import version_of
from .keys import RowFormat, short

ImageRef = str | bytes | dict[str, Any]
"""An absolute path or an address, bytes, `{"lmdb_file", "lmdb_key"}` or `{"tar", "member"}`: what `eagle_sampling.open_image` takes."""

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".3gp", ".gif"}
)
"""What counts as a video in a folder; a file that is named is taken whatever its suffix."""
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://|data:[\w/+.-]*[;,]")
"""Addresses, which are not files: `s3://...`, `data:image/png;base64,...`; `clip1:2.png` is a file."""
_LONGEST_PATH = 4096
"""Characters; Linux takes no longer path. What is longer is a picture in base64 that stands in a path's place."""
_LARGEST = 1 << 36
"""Bytes of a video inside of another file; `data.limits` are checked when it is measured."""
_IMAGE = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|bmp|tiff?|jp2|heic|avif|tga|p[bgp]m)$", re.IGNORECASE)
_IMAGE_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_PATHS = ("path", "url", "file")
_KEYS = frozenset({*_PATHS, "bytes", "lmdb_file", "lmdb_key", "tar", "member", "offset", "size"})
_IMAGE_KEYS = _KEYS | {"image", "detail"}
_VIDEO_KEYS = _KEYS - {"lmdb_file", "lmdb_key"} | {"video", "frames", *RATES, *STARTS, *ENDS, *RANGES}
_BOUNDS = frozenset({*STARTS, *ENDS, *RANGES})
_DOCUMENT_KEYS = _KEYS | {"document", "pages"}


class Media:
    """Collects the references of one row."""

    def __init__(self, root: str | Path, form: RowFormat) -> None:
        self.root = root if isinstance(root, str) and addresses.scheme_of(root) else Path(root)
        self.unpacked = form.media
        self.on_damage: Literal["refuse", "conceal"] = form.on_damage
        self.images: list[ImageRef] = []
        self.videos: list[VideoRef] = []
        self.documents: list[VideoRef] = []

    def count(self, kind: str) -> int:
        return len({"image": self.images, "video": self.videos, "document": self.documents}[kind])

    def add(self, kind: str, items: Any, *, clip: Mapping[str, Any] | None = None) -> None:
        """Add one reference or a list of them. clip: bounds and rate that stand next to the reference."""
        clip = clip or {}
        if kind == "document" and isinstance(items, list) and items and not any(map(_is_document, items)):
            items = [items]  # a flat list of page images is one document
        elif kind == "video" and isinstance(items, list) and items and all(map(_is_image, items)):
            items = [items]  # a flat list of images is one video
        listed = items if isinstance(items, list) else [items]
        if clip and len(listed) != 1:
            raise RowError("bad-media", f"{', '.join(clip)} stands next to {len(listed)} videos; write it into the mapping of each video")
        for item in listed:
            if kind == "image":
                self.images.append(self.image(item))
            elif kind == "video":
                self.videos.append(self.video(item, clip))
            else:
                self.documents.append(self.document(item))

    def path(self, value: Any, what: str) -> str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str) or not value:
            raise RowError("bad-media", f"{what} is {short(value)}, expected a path")
        if value.startswith("file://"):
            value = unquote(value.removeprefix("file://"))
        if _ADDRESS.match(value):
            return _address(value, what)
        if len(value) > _LONGEST_PATH:
            raise RowError("bad-media", f"{what} {short(value)} has {len(value)} characters and is not a path; media are read from files")
        if "\0" in value:
            raise RowError("bad-media", f"{what} {short(value)} has a zero byte")
        try:
            os.fsencode(value)
        except UnicodeEncodeError as error:  # half of a surrogate pair, except those that Python spells odd bytes of a name with
            raise RowError("bad-media", f"{what} {short(value)} can't be a path: {error}") from error
        if isinstance(self.root, str):
            return value if os.path.isabs(value) else _address(addresses.join(self.root, value), what)
        return str(self.root / value)

    def image(self, item: Any) -> ImageRef:
        if isinstance(item, bytes):
            return _bytes(item, "an image")
        if not isinstance(item, Mapping):
            return self.path(item, "image")
        _check(item, _IMAGE_KEYS, "an image")
        return self._stored(item, "image") or self.path(_place(item, "image"), "image")

    def video(self, item: Any, clip: Mapping[str, Any]) -> VideoRef:
        if isinstance(item, list | bytes | str):
            item = {"video": item}
        elif not isinstance(item, Mapping):
            item = {"video": self.path(item, "video")}
        _check(item, _VIDEO_KEYS, "a video")
        about = {**clip, **{key: value for key, value in item.items() if value is not None}}
        if both := [key for key in clip if item.get(key) is not None and item[key] != clip[key]]:
            raise RowError("bad-media", f"a video has two values of {both[0]}: {short(item[both[0]])} and {short(clip[both[0]])}")
        start, end = bounds(about)
        place = item.get("frames", _place(item, "video"))
        if isinstance(place, Mapping) and item.get("video") is place:
            return self.video({**place, **{key: value for key, value in about.items() if key != "video"}}, {})
        if isinstance(place, list):
            return self._frames(place, about, start, end)
        # A WebP file may be an animation, which only its content says: measuring a still one refuses it.
        if _is_image(place if item.get("bytes") is None else item) and not str(place).lower().endswith(".webp"):
            raise RowError("bad-media", f"the video {short(place)} is an image; give it as an image, or the frames of a video as a list")
        if rates := [key for key in RATES if about.get(key) is not None]:
            why = "which is for lists of frames; sampling.fps sets how many frames of a file are taken"
            raise RowError("bad-media", f"a video file has {rates[0]}, {why}")
        if isinstance(place, bytes):
            item = {"bytes": place}
        if (stored := self._stored(item, "video")) is not None:
            return VideoRef(self._as_file(stored, ".mp4"), start, end, on_damage=self.on_damage)
        return VideoRef(self.path(place, "video"), start, end, on_damage=self.on_damage)

    def _frames(self, frames: Sequence[Any], about: Mapping[str, Any], start: float | None, end: float | None) -> VideoRef:
        """A video of images. With fps their times are known and a clip can be cut; without, they are numbered frames."""
        if not frames:
            raise RowError("bad-media", "a video has no frames")
        fps = rate_of(about)
        if fps is None:
            if start is not None or end is not None:
                raise RowError("bad-media", "a list of frames has bounds in seconds but no fps; write fps next to it")
            return VideoRef(frames=tuple(map(self.image, frames)))
        times = [number / fps for number in range(len(frames))]
        kept = [place for place, time in enumerate(times) if (start is None or time >= start) and (end is None or time <= end)]
        if not kept:
            raise RowError("bad-media", f"no frame lies between {start} s and {end} s; there are {len(frames)} at {fps} fps")
        # Times count from the start of the clip, as in clips of files.
        zero = start or 0.0
        shown = tuple(times[place] - zero for place in kept)
        return VideoRef(frames=tuple(self.image(frames[place]) for place in kept), times=shown, fps=fps)

    def document(self, item: Any) -> VideoRef:
        if isinstance(item, bytes):
            item = {"bytes": item}
        if isinstance(item, Mapping):
            _check(item, _DOCUMENT_KEYS, "a document")
            if (stored := self._stored(item, "document")) is not None:
                name = str(item.get("member", item.get("path", "")))
                suffix = ".pdf" if isinstance(stored, bytes) and b"%PDF-" in stored[:1024] else Path(name).suffix
                return VideoRef(self._as_file(stored, suffix)) if _has_pages(f"x{suffix}") else VideoRef(frames=(stored,))
            item = item.get("pages", _place(item, "document"))
        if isinstance(item, list):
            if not item:
                raise RowError("bad-media", "a document has no pages")
            return VideoRef(frames=tuple(self.image(page) for page in item))
        if _has_pages(item):
            return VideoRef(self.path(item, "document"))
        return VideoRef(frames=(self.image(item),))

    def _stored(self, item: Mapping[str, Any], what: str) -> ImageRef | None:
        """Bytes, a value of an LMDB or a member of a tar file; None for a reference by path."""
        if item.get("bytes") is not None:
            return _bytes(item["bytes"], f"the {what} {item.get('path', '')}".strip())
        if "lmdb_file" in item and "lmdb_key" in item:
            return {"lmdb_file": self.path(item["lmdb_file"], "lmdb_file"), "lmdb_key": str(item["lmdb_key"])}
        if "tar" in item and "member" in item:
            place = {key: item[key] for key in ("offset", "size") if key in item}
            return {"tar": self.path(item["tar"], "tar"), "member": str(item["member"]), **place}
        return None

    def _as_file(self, stored: ImageRef | None, suffix: str) -> str:
        """A file with the bytes of a video or document: their readers take files only. It is written once and kept."""
        if self.unpacked is None or stored is None:
            raise RowError("bad-media", "a video or document inside of another file needs a folder of facts to be taken out to")
        if isinstance(stored, bytes):
            identity = stored
        else:
            try:
                version = version_of(stored["tar"])  # pyright: ignore[reportArgumentType]
            except OSError as error:
                raise RowError("media-missing", f"{stored['tar']}: {error.strerror}") from error  # pyright: ignore[reportArgumentType]
            except MediaError as error:
                raise RowError("media-missing", str(error)) from error
            identity = repr((sorted(stored.items()), *version)).encode()  # pyright: ignore[reportAttributeAccessIssue]
            suffix = Path(stored["member"]).suffix or suffix  # pyright: ignore[reportArgumentType]
        target = Path(self.unpacked) / f"{hashlib.blake2b(identity, digest_size=16).hexdigest()}{suffix}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                content = read_bytes(stored, limits=Limits(max_bytes=_LARGEST))
            except MediaError as error:
                raise RowError("media-missing", str(error)) from error
            with replacing(target) as file:
                file.write(content)
        return str(target)


def _address(value: str, what: str) -> str:
    """An address that this process reads; raises RowError for any other, and for one with credentials, which messages would repeat."""
    if not is_remote(value):
        scheme = addresses.scheme_of(value)
        hint = f", or add {scheme} to data.remote.schemes" if scheme else ""
        shown = short(addresses.without_secrets(value)) if scheme else short(value)
        raise RowError("bad-media", f"{what} {shown} is an address; media are read from files, download it first{hint}")
    if (secret := addresses.secret_in(value)) is not None:
        why = f"carries credentials ({secret}); leave them to the environment's standard places, or download the file"
        raise RowError("bad-media", f"{what} {short(addresses.without_secrets(value))} {why}")
    return value


def _place(item: Mapping[str, Any], kind: str) -> Any:
    """What a mapping says where the medium is; the mapping itself, which no path is, when it says nothing."""
    return next((item[key] for key in (*_PATHS, kind) if item.get(key) is not None), dict(item))


def _check(item: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    unknown = [key for key, value in item.items() if key not in known and value is not None and key != "type"]
    if unknown:
        names = sorted(key for key in known if key in ("start", "end") or key not in _BOUNDS)
        raise RowError("unknown-key", f"{what} has the keys {', '.join(map(repr, unknown))}; known are {', '.join(names)}")
    if item.get("tar") is None and (inside := [key for key in ("member", "offset", "size") if item.get(key) is not None]):
        raise RowError("unknown-key", f"{what} has {inside[0]!r}, which is for members of a tar file, and no 'tar'")


def _bytes(value: Any, what: str) -> bytes:
    if not isinstance(value, bytes) or not value:
        raise RowError("bad-media", f"{what} has bytes of type {type(value).__name__}, or none")
    return value


def _is_document(item: Any) -> bool:
    """Whether an item of a list is a document by itself, and not a page of the one that the list is."""
    if isinstance(item, Mapping):
        return "pages" in item or "document" in item or _is_pdf(item.get("path")) or _is_pdf(item.get("member"))
    return isinstance(item, list) or _is_pdf(item)


def _is_pdf(item: Any) -> bool:
    return isinstance(item, str) and item.lower().endswith(".pdf")


def _has_pages(item: Any) -> bool:
    """Whether a file is a document by itself. A TIFF in a list of images is one of the pages."""
    return isinstance(item, str) and item.lower().endswith((".pdf", ".tif", ".tiff"))


def _is_image(item: Any) -> bool:
    """Whether an item in the place of a video is one of its frames. Bytes of an animation (GIF, WebP) are a video."""
    if isinstance(item, Mapping):
        if "lmdb_file" in item or "image" in item:
            return True
        if isinstance(item.get("bytes"), bytes):
            return _is_image(item["bytes"])
        item = item.get("path", item.get("member"))
    if isinstance(item, bytes):
        animated = item[12:16] == b"VP8X" and item[20:21] != b"" and item[20] & 2
        return item.startswith(_IMAGE_BYTES) or (item[:4] == b"RIFF" and item[8:12] == b"WEBP" and not animated)
    return isinstance(item, str) and _IMAGE.search(item) is not None


def video_files(folder: Path) -> list[Path]:
    """The files below a folder that are videos by their suffix, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
