"""Documents as pages: PDF (pypdfium2, the extra `eagle-sampling[pdf]`), multi-page TIFF, and animated GIF or WebP."""

from __future__ import annotations

import importlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from .files import check_regular, open_remote, read_whole
from .images import decoding, open_lazily
from .limits import DEFAULT_LIMITS, Limits, MediaError, checked_out, path_text, unreadable, whole_number

LONGEST_SIDE = 8
"""A page is rendered at most this many times as long as its tile: 8 * 448 * 448 pixels, 5 MB as RGB, for any size that the file states."""

_pdfium_lock = threading.Lock()  # PDFium is not thread-safe


def pdf_size(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int, int]:
    """(pages, width, height) of a PDF or TIFF; the size is that of the first page, of a PDF in points (1/72 inch), at least 1.

    Raises MediaError when the file cannot be read as one, has no pages, or has more than `limits.max_frames`.
    """
    name = path_text(path, "the path of a document")
    if _is_tiff(name):
        count = page_count(name, limits=limits)
        with open_lazily(name, name) as image:
            limits.check_size(*image.size, name)
            return count, *image.size
    with _open_pdf(name) as document:
        count = _checked_count(len(document), name, limits)
        width, height = document[0].get_size()
        return count, max(round(width), 1), max(round(height), 1)


def render_pages(path: str | os.PathLike[str], pages: npt.ArrayLike, side: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Pages of a PDF or TIFF as tiles, uint8 [n, side, side, 3]: each page is resized (bicubic) to one square tile.

    pages: 0-based numbers, int [n]. out: array of the result's shape to fill and return.
    Raises MediaError when the file cannot be read as a PDF or a page does not exist or cannot be drawn, ValueError for pages that are not a
    list of whole numbers, a `side` below 1, or an `out` of another shape or dtype or that is read-only, TypeError for a `side` that is not
    a whole number.
    """
    name = path_text(path, "the path of a document")
    numbers = _numbers(pages)
    side = _side("side", side)
    shape = (len(numbers), side, side, 3)
    tiles = np.empty(shape, np.uint8) if out is None else checked_out(out, shape)
    if _is_tiff(name):
        for place, image in enumerate(read_pages(name, numbers)):
            with decoding(f"{name}: page {numbers[place]} can't be shown in RGB"):
                tiles[place] = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
        return tiles
    with _open_pdf(name) as document:
        for place, number in enumerate(numbers):
            page = document[_existing(number, len(document), name)]
            width, height = page.get_size()
            # The short side is rendered no smaller than the tile, so that small print survives the resize to a square. A page may be very
            # long and thin; LONGEST_SIDE bounds its picture.
            scale = min(side / max(min(width, height), 1), LONGEST_SIDE * side / max(width, height, 1))
            image = page.render(scale=scale).to_pil().convert("RGB")
            tiles[place] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    return tiles


def page_count(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> int:
    """Pages of a PDF, or pictures of a TIFF, GIF or WebP. Raises MediaError when it cannot be read or has more than `limits.max_frames`."""
    name = path_text(path, "the path of a document")
    if _is_pdf(name):
        with _open_pdf(name) as document:
            count = len(document)
    else:
        with open_lazily(name, name) as image, decoding(f"{name}: its pictures can't be counted"):
            count = getattr(image, "n_frames", 1)
    return _checked_count(count, name, limits)


def whole_pages(path: str | os.PathLike[str]) -> int:
    """Pages of a TIFF without reduced copies of others (bit 0 of the tag NewSubfileType), which cameras and viewers store as previews.

    Raises MediaError when it cannot be read.
    """
    name = path_text(path, "the path of a document")
    with open_lazily(name, name) as image, decoding(f"{name}: its pages can't be counted"):
        count = 0
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            count += not int(getattr(image, "tag_v2", {}).get(254, 0)) & 1
        return count


def page_sizes(path: str | os.PathLike[str], *, dpi: float = 144.0, limits: Limits = DEFAULT_LIMITS) -> list[tuple[int, int]]:
    """(width, height) in pixels of every page: a PDF's at `dpi`, a picture's own.

    Raises MediaError as `page_count`, and ValueError for a `dpi` that is not above 0.
    """
    _check_dpi(dpi)
    name = path_text(path, "the path of a document")
    count = page_count(name, limits=limits)
    if _is_pdf(name):
        with _open_pdf(name) as document:
            return [_pixels(document.get_page_size(i), dpi / 72) for i in range(count)]
    with open_lazily(name, name) as image, decoding(f"{name}: its pictures have no sizes"):
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
    Raises MediaError when a page does not exist, cannot be drawn, or is over the limits, ValueError for pages that are not a list of whole
    numbers and for a `dpi` or `size` that is not above 0, TypeError for a `size` that is not a whole number.
    """
    name = path_text(path, "the path of a document")
    _check_dpi(dpi)
    size = None if size is None else _side("size", size)
    numbers = None if pages is None else _numbers(pages)
    count = page_count(name, limits=limits)
    wanted = [_existing(page, count, name) for page in (range(count) if numbers is None else numbers)]
    if not _is_pdf(name):
        return [_picture(name, page, limits) for page in wanted]
    images: list[Image.Image] = []
    with _open_pdf(name) as document:
        for number in wanted:
            points = document.get_page_size(number)
            scale = dpi / 72 if size is None else _scale_to(size, max(points))
            limits.check_size(*_pixels(points, scale), f"{name}, page {number}")
            images.append(document[number].render(scale=scale).to_pil().convert("RGB"))
    return images


def animation_times(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    """Presentation times of an animated GIF's or WebP's pictures, float64 [n] seconds; a delay of 0 counts as 0.1 s, as in browsers.

    Raises MediaError when it cannot be read.
    """
    name = path_text(path, "the path of a document")
    durations: list[float] = []
    with open_lazily(name, name) as image, decoding(f"{name}: its pictures can't be decoded"):
        for page in ImageSequence.Iterator(image):
            page.load()
            durations.append(float(page.info.get("duration", 0)) or 100.0)
    return np.cumsum([0.0, *durations[:-1]]) / 1000


def _numbers(pages: npt.ArrayLike) -> list[int]:
    """Page numbers as ints."""
    numbers = np.asarray(pages)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ValueError(f"pages are {pages!r}: need a list of whole numbers, 0-based")
    return [int(number) for number in numbers]


def _side(name: str, value: int) -> int:
    value = whole_number(name, value)
    if value < 1:
        raise ValueError(f"{name} = {value}: need at least 1 pixel")
    return value


def _check_dpi(dpi: float) -> None:
    if not isinstance(dpi, (int, float, np.number)) or not 0 < dpi < math.inf:
        raise ValueError(f"dpi = {dpi!r}: need a number of pixels per inch above 0")


def _checked_count(count: int, name: str, limits: Limits) -> int:
    if count < 1:
        raise MediaError(f"{name}: has no pages")
    limits.check_frames(count, name)
    return count


def _existing(number: int, count: int, name: str) -> int:
    if not 0 <= number < count:
        raise MediaError(
            f"{name}: page {number} does not exist (pages 0 to {count - 1} do); if the file changed since its pages were counted, "
            "count them again (eagle prepare)"
        )
    return number


def _picture(name: str, page: int, limits: Limits) -> Image.Image:
    with open_lazily(name, name) as image, decoding(f"{name}: page {page} can't be decoded"):
        image.seek(page)
        limits.check_size(*image.size, f"{name}, page {page}")
        return image.copy()


def _is_tiff(name: str) -> bool:
    return name.lower().endswith((".tif", ".tiff"))


def _is_pdf(name: str) -> bool:
    if (remote := open_remote(name)) is not None:
        head = remote.read(0, 1024)
        remote.close()
        return b"%PDF-" in head
    try:
        check_regular(name)
        with open(name, "rb") as file:
            return b"%PDF-" in file.read(1024)
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from error


def _pixels(points: tuple[float, float], scale: float) -> tuple[int, int]:
    """Size in pixels of a page of that many points when drawn: pypdfium2 rounds up."""
    width, height = points
    return max(math.ceil(width * scale), 1), max(math.ceil(height * scale), 1)


def _scale_to(size: int, points: float) -> float:
    """The largest scale at which `points` are no more than `size` pixels: their quotient may give one more."""
    scale = size / points
    while math.ceil(points * scale) > size:
        scale = math.nextafter(scale, 0)
    return scale


@contextmanager
def _open_pdf(name: str) -> Iterator[Any]:
    """An open PDF document, one at a time in a process; errors of PDFium become MediaErrors."""
    try:
        pdfium: Any = importlib.import_module("pypdfium2")
    except ImportError as error:
        raise MediaError(f"{name}: reading a PDF needs pypdfium2; install it with: pip install 'eagle-sampling[pdf]'") from error
    content = read_whole(name, DEFAULT_LIMITS)  # not by PDFium: it hides the errors of a stream
    with _pdfium_lock:
        try:
            if content is None:
                check_regular(name)
            document = pdfium.PdfDocument(content if content is not None else Path(name))
        except pdfium.PdfiumError as error:
            raise MediaError(f"{name}: can't be read as a PDF: {error}") from error
        except (OSError, ValueError) as error:
            raise unreadable(name, error) from error
        try:
            yield document
        except pdfium.PdfiumError as error:
            raise MediaError(f"{name}: a page can't be drawn: {error}") from error
        finally:
            document.close()
