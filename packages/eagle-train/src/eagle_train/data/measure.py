"""What one sample costs and holds: token counts from its prompt, sizes from image headers, times from video containers.

The measuring itself is `eagle_model.visual.facts`; here are the limits, the checks that `data.verify` asks for, and a memory of media that
many rows share.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from eagle_model.prompt import CachedEncoder, Media, PromptError, place_media
from eagle_model.prompt.costs import PromptCosts
from eagle_model.visual import ClipError, VideoFacts, VideoRef, measure_image, measure_video
from eagle_sampling import Limits, MediaError, VideoInfo, probe, read_frames, whole_pages
from eagle_sampling.images import exists
from eagle_train.config import LimitsConfig

from .errors import RowError
from .facts import times_to_list
from .sample import Sample
from .verify import check_image


def media_limits(limits: LimitsConfig) -> Limits:
    """The configuration's limits as eagle_sampling takes them."""
    return Limits(max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, max_frames=limits.max_frames)


class Measurer:
    """Measures samples with one tokenizer and one set of limits; remembers the last few thousand images and videos it looked at."""

    def __init__(self, tokenizer: Any, limits: LimitsConfig, verify: str) -> None:
        self.costs = PromptCosts(CachedEncoder(tokenizer))
        self.limits = media_limits(limits)
        self.verify = verify
        self._image = lru_cache(maxsize=4096)(self._image_at)
        self._probe: Callable[[str, Any], VideoInfo] = lru_cache(maxsize=256)(self._probe_at)

    def measure(self, sample: Sample) -> dict[str, Any]:
        """The facts of one sample except where its row stands; raises RowError with a reason to count by."""
        answers = [message for message in sample.messages if message["role"] == "assistant" and message["content"]]
        if not any(message.get("train", True) for message in answers):
            why = "says that it is not learned" if answers else "is empty"
            raise RowError("no-labels", f"every assistant turn {why}: all labels are masked")
        timed = [video.timed for video in sample.videos]
        try:
            text = self.costs.fixed_tokens(sample.messages, len(sample.images), len(sample.videos), timed=timed)
        except PromptError as error:
            raise RowError("placeholders", str(error)) from error
        if text.label_tokens < 1:
            raise RowError("no-labels", "no token has a label")
        sizes = [self.image(ref) for ref in sample.images]
        videos = [self.video(video) for video in sample.videos]
        facts: dict[str, Any] = {
            "text_tokens": text.text_tokens,
            "label_tokens": text.label_tokens,
            "media_group": media_group(sample, sizes, videos),
            "image_width": [width for width, _ in sizes],
            "image_height": [height for _, height in sizes],
        }
        for name in ("frames", "seconds", "last_time", "start", "end", "width", "height"):
            facts[f"video_{name}"] = [getattr(video, name) for video in videos]
        facts["video_fps"] = [video.fps for video in videos]
        facts["video_times"] = [times_to_list(video) for video in videos]
        return facts

    def image(self, ref: Any) -> tuple[int, int]:
        """(width, height) of an image, checked as far as `verify` says."""
        if isinstance(ref, bytes):  # of this row alone
            return self._image_at(ref)
        return self._image(ref if isinstance(ref, str) else tuple(ref.items()))

    def _image_at(self, key: Any) -> tuple[int, int]:
        ref = key if isinstance(key, str | bytes) else dict(key)
        try:
            size = measure_image(ref, self.limits)
            check_image(ref, self.verify, self.limits)
            if isinstance(ref, str) and ref.lower().endswith((".tif", ".tiff")) and (pages := whole_pages(ref)) > 1:
                why = "of which an image shows the first; write it as a document"
                raise RowError("bad-image", f'{ref}: has {pages} pages, {why}: {{"document": ...}}')
        except (MediaError, OSError) as error:
            raise RowError(_missing_or("bad-image", ref), str(error)) from error
        return size

    def video(self, video: VideoRef) -> VideoFacts:
        """Facts of a video, a clip or a document."""
        for page in video.frames:
            self.image(page)
        try:
            info = self._probe(video.path, video.on_damage) if video.path is not None and not video.is_paged else None
            return measure_video(video, self.limits, info=info)
        except ClipError as error:
            raise RowError("bad-clip", str(error)) from error
        except MediaError as error:
            kind = "bad-document" if video.is_document else "bad-video"
            raise RowError(_missing_or(kind, video.path), str(error)) from error

    def _probe_at(self, path: str, on_damage: Literal["refuse", "conceal"]) -> VideoInfo:
        try:
            info = probe(path, limits=self.limits)
            self.limits.check_size(info.width, info.height, path)
            if self.verify == "decode" and info.times is not None:
                read_frames(path, info.times.times()[-1:], None, on_damage=on_damage)
        except OSError as error:
            raise MediaError(str(error)) from error
        return info


def media_group(sample: Sample, sizes: list[tuple[int, int]], videos: list[VideoFacts]) -> int:
    """What rows must have in common to share their media in a pack, as a number: the media with their clip bounds and sizes, and all of the
    prompt through the last of them. 0 for a row without media, and for one with a label before its last medium."""
    placed = place_media(sample.messages, len(sample.images), len(sample.videos))
    last = max((i for i, (_, pieces) in enumerate(placed) if any(isinstance(piece, Media) for piece in pieces)), default=-1)
    if last < 0 or any(role == "assistant" for role, _ in placed[: last + 1]):
        return 0
    role, pieces = placed[last]
    end = max(i for i, piece in enumerate(pieces) if isinstance(piece, Media)) + 1
    common = [*placed[:last], (role, pieces[:end])]
    measured = [(video.frames, video.seconds, video.start, video.end, video.fps) for video in videos]
    images = [_digest(image) for image in sample.images]
    files = [(video.path, [_digest(frame) for frame in video.frames], video.times) for video in sample.videos]
    described = repr((common, images, files, sizes, measured)).encode()
    return int.from_bytes(hashlib.blake2b(described, digest_size=8).digest(), "little", signed=True) or 1


def _digest(ref: Any) -> Any:
    """An image reference; of bytes, what names them."""
    return hashlib.blake2b(ref, digest_size=16).hexdigest() if isinstance(ref, bytes) else ref


def _missing_or(reason: str, ref: Any) -> str:
    """`media-missing` when there is nothing at `ref`, else `reason`."""
    try:
        return reason if exists(ref) else "media-missing"
    except MediaError:
        return "media-missing"
