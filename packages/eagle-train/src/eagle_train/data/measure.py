"""What one sample costs and holds: token counts from the one prompt, sizes from image headers, times from video containers."""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from eagle_model.prompt import PromptError
from eagle_model.prompt_costs import PromptCosts
from eagle_sampling import Limits, MediaError, VideoInfo, clip_range, image_size, pdf_size, probe, read_frames
from eagle_sampling.images import exists
from eagle_train.config import LimitsConfig

from .encoding import CachedEncoder
from .facts import FrameCosts
from .sample import RowError, Sample, VideoRef
from .verify import check_image


def media_limits(limits: LimitsConfig) -> Limits:
    """The configuration's limits as eagle_sampling takes them."""
    return Limits(max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, max_frames=limits.max_frames)


def frame_costs(costs: PromptCosts) -> FrameCosts:
    """Tokens around a frame for every number of digits that its number and its time may have."""
    return FrameCosts(
        tuple(
            tuple(costs.frame_tokens(10 ** max(digits, 1) - 1, None if whole == 0 else 10.0**whole - 0.01, 0) for whole in range(8))
            for digits in range(8)
        )
    )


class Measurer:
    """Measures samples with one tokenizer and one set of limits; remembers the last few thousand images and videos it looked at."""

    def __init__(self, tokenizer: Any, limits: LimitsConfig, verify: str) -> None:
        self.costs = PromptCosts(CachedEncoder(tokenizer))
        self.limits = media_limits(limits)
        self.verify = verify
        self._image = lru_cache(maxsize=4096)(self._image_at)
        self._video: Callable[[str], VideoInfo] = lru_cache(maxsize=256)(self._video_at)

    def measure(self, sample: Sample) -> dict[str, Any]:
        """The facts of one sample but for where its row stands; raises RowError with a reason to count by."""
        if not any(message["role"] == "assistant" and message["content"] for message in sample.messages):
            raise RowError("no-labels", "every assistant turn is empty: all labels are masked")
        timed = [not video.is_document for video in sample.videos]
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
            "image_width": [width for width, _ in sizes],
            "image_height": [height for _, height in sizes],
        }
        for name in ("frames", "seconds", "end", "start", "stop", "width", "height", "times"):
            facts[f"video_{name}"] = [video[name] for video in videos]
        return facts

    def image(self, ref: Any) -> tuple[int, int]:
        """(width, height) of an image, checked as far as `verify` says."""
        key = ref if isinstance(ref, str) else (ref["lmdb_file"], ref["lmdb_key"])
        return self._image(key)

    def _image_at(self, key: Any) -> tuple[int, int]:
        ref = key if isinstance(key, str) else {"lmdb_file": key[0], "lmdb_key": key[1]}
        try:
            width, height = image_size(ref)
            self.limits.check_size(width, height, str(key))
            check_image(ref, self.verify, self.limits)
        except (MediaError, OSError) as error:
            raise RowError("media-missing" if not _exists(ref) else "bad-image", str(error)) from error
        return width, height

    def video(self, video: VideoRef) -> dict[str, Any]:
        """Facts of a video, a clip or a document."""
        if video.pages:
            sizes = [self.image(page) for page in video.pages]
            return _document(len(sizes), *sizes[0])
        if video.is_document:
            return _document(*self._pdf(video.path))
        assert video.path is not None
        info = self._video(video.path)
        if info.times is None:
            raise RowError("bad-video", f"{video.path}: the times of its frames can't be known")
        times = info.times.times()
        try:
            first, stop = clip_range(times, video.start, video.end)
        except ValueError as error:
            raise RowError("bad-clip", f"{video.path}: {error}") from error
        last_end = float(times[0]) + (info.duration or 0.0)
        begin = float(times[first]) if video.start is None else video.start
        finish = last_end if video.end is None else min(video.end, last_end)
        return {
            "frames": stop - first,
            "seconds": max(finish - begin, 0.0),
            "end": max(float(times[stop - 1]) - (video.start or 0.0), 0.0),
            "start": video.start,
            "stop": video.end,
            "width": info.width,
            "height": info.height,
            "times": info.times.to_list(),
        }

    def _pdf(self, path: str | None) -> tuple[int, int, int]:
        assert path is not None
        try:
            self.limits.check_bytes(os.stat(path).st_size, path)
            pages, width, height = pdf_size(path)
            self.limits.check_frames(pages, path)
        except (MediaError, OSError) as error:
            raise RowError("media-missing" if not _exists(path) else "bad-document", str(error)) from error
        return pages, width, height

    def _video_at(self, path: str) -> VideoInfo:
        try:
            info = probe(path, limits=self.limits)
            self.limits.check_size(info.width, info.height, path)
            if self.verify == "decode" and info.times is not None:
                read_frames(path, info.times.times()[-1:], None)
        except (MediaError, OSError) as error:
            raise RowError("media-missing" if not _exists(path) else "bad-video", str(error)) from error
        return info


def _document(pages: int, width: int, height: int) -> dict[str, Any]:
    nothing = {"seconds": None, "end": None, "start": None, "stop": None, "times": []}
    return {"frames": pages, "width": width, "height": height, **nothing}


def _exists(ref: Any) -> bool:
    try:
        return exists(ref)
    except MediaError:
        return False
