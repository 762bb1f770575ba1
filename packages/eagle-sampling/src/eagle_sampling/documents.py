"""Documents as lists of pages: PDF (pypdfium2, the extra `eagle-sampling[pdf]`), multi-page TIFF, and animated GIF or WebP as films."""

from __future__ import annotations

import importlib
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from .images import _pillow, decoding, unreadable
from .limits import DEFAULT_LIMITS, Limits, MediaError

_pdfium_lock = threading.Lock()  # PDFium isn't thread-safe


def page_count(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> int:
    """Pages of a PDF, or pictures of a TIFF, GIF or WebP. Raises MediaError when it can't be read or has more than `limits.max_frames`."""
    name = os.fspath(path)
    if _is_pdf(name):
        with _pdfium_lock, _Pdf(name) as document:
            count = len(document)
    else:
        with _pillow(name, name) as image, decoding(f"{name}: its pictures can't be counted"):
            count = getattr(image, "n_frames", 1)
    limits.check_frames(count, name)
    if count == 0:
        raise MediaError(f"{name}: has no pages")
    return count


def page_sizes(path: str | os.PathLike[str], *, dpi: float = 144.0, limits: Limits = DEFAULT_LIMITS) -> list[tuple[int, int]]:
    """(width, height) in pixels of every page: a PDF's at `dpi`, a picture's own."""
    name = os.fspath(path)
    count = page_count(name, limits=limits)
    if _is_pdf(name):
        with _pdfium_lock, _Pdf(name) as document:
            return [_pixels(document.get_page_size(i), dpi / 72) for i in range(count)]
    with _pillow(name, name) as image, decoding(f"{name}: its pictures have no sizes"):
        return [page.size for page in ImageSequence.Iterator(image)]


def read_pages(
    path: str | os.PathLike[str],
    pages: Sequence[int] | None = None,
    *,
    dpi: float = 144.0,
    size: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> list[Image.Image]:
    """The chosen pages (0-based; None: all) as RGB images, or in the picture's own mode for TIFF, GIF and WebP.

    dpi: resolution at which PDF pages are drawn; size: the longer side in pixels instead.
    Raises MediaError when a page doesn't exist, can't be drawn, or is over the limits.
    """
    name = os.fspath(path)
    count = page_count(name, limits=limits)
    wanted = range(count) if pages is None else pages
    for page in wanted:
        if not 0 <= page < count:
            raise MediaError(f"{name}: there is no page {page}; it has {count}, counted from 0")
    if not _is_pdf(name):
        return [_picture(name, page, limits) for page in wanted]
    images = []
    with _pdfium_lock, _Pdf(name) as document:
        for number in wanted:
            points = document.get_page_size(number)
            scale = dpi / 72 if size is None else _scale_to(size, max(points))
            limits.check_size(*_pixels(points, scale), f"{name}, page {number}")
            images.append(document[number].render(scale=scale).to_pil().convert("RGB"))
    return images


def animation_times(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    """Presentation times of an animated GIF's or WebP's pictures, float64 [n] seconds; the delay that browsers use for 0 (0.1 s)."""
    name = os.fspath(path)
    durations = []
    with _pillow(name, name) as image, decoding(f"{name}: its pictures can't be decoded"):
        for page in ImageSequence.Iterator(image):
            page.load()
            durations.append(float(page.info.get("duration", 0)) or 100.0)
    return np.cumsum([0.0, *durations[:-1]]) / 1000


def _picture(name: str, page: int, limits: Limits) -> Image.Image:
    with _pillow(name, name) as image, decoding(f"{name}: page {page} can't be decoded"):
        image.seek(page)
        limits.check_size(*image.size, f"{name}, page {page}")
        return image.copy()


def _is_pdf(name: str) -> bool:
    try:
        with open(name, "rb") as file:
            return b"%PDF-" in file.read(1024)
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from error


def _pixels(points: tuple[float, float], scale: float) -> tuple[int, int]:
    """What a page of that many points has when drawn: pypdfium2 takes the ceiling."""
    width, height = points
    return max(math.ceil(width * scale), 1), max(math.ceil(height * scale), 1)


def _scale_to(size: int, points: float) -> float:
    """The largest scale at which `points` are no more than `size` pixels: their quotient may give one more."""
    scale = size / points
    while math.ceil(points * scale) > size:
        scale = math.nextafter(scale, 0)
    return scale


class _Pdf:
    """An open PDF document; PDFium's errors become MediaErrors."""

    def __init__(self, name: str):
        try:
            self.library: Any = importlib.import_module("pypdfium2")
        except ImportError as error:
            raise MediaError(f"{name}: reading a PDF needs pypdfium2: pip install 'eagle-sampling[pdf]'") from error
        self.name = name

    def __enter__(self) -> Any:
        try:
            self.document = self.library.PdfDocument(Path(self.name))
        except self.library.PdfiumError as error:
            raise MediaError(f"{self.name}: can't be read as a PDF: {error}") from error
        return self.document

    def __exit__(self, kind: Any, error: BaseException | None, trace: object) -> None:
        self.document.close()
        if isinstance(error, self.library.PdfiumError):
            raise MediaError(f"{self.name}: a page can't be drawn: {error}") from error
