"""PDF documents: how many pages, how large, and pages as tiles. pypdfium2 comes with `eagle-sampling[pdf]` and is needed only here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from eagle_sampling import MediaError

LONGEST_SIDE = 8
"""A page is rendered at most this many times as long as its tile: 8 * 448 * 448 pixels, 6 MB, whatever the file says its size is."""


def pdf_size(path: str) -> tuple[int, int, int]:
    """(pages, width, height) of a PDF file, the size being that of its first page in points; raises MediaError."""
    with _open(path) as document:
        if len(document) < 1:
            raise MediaError(f"{path}: has no pages")
        width, height = document[0].get_size()
        return len(document), max(round(width), 1), max(round(height), 1)


def render_pages(path: str, pages: np.ndarray, side: int, out: np.ndarray | None = None) -> np.ndarray:
    """Pages (0-based, int [n]) of a PDF as tiles, uint8 [n, side, side, 3] (`out`, if given): a page costs one tile. Raises MediaError."""
    tiles = np.empty((len(pages), side, side, 3), np.uint8) if out is None else out
    with _open(path) as document:
        for place, number in enumerate(np.asarray(pages).tolist()):
            if number >= len(document):
                raise MediaError(f"{path}: page {number + 1} of {len(document)} is gone; run eagle prepare again")
            page = document[number]
            width, height = page.get_size()
            # Rendered no smaller than the tile on its short side, so that small print survives the squeeze into a square; but a page
            # may be as thin as a hair and as long as a road, and no picture is made longer than 8 tiles.
            scale = min(side / max(min(width, height), 1), LONGEST_SIDE * side / max(width, height, 1))
            image = page.render(scale=scale).to_pil().convert("RGB")
            tiles[place] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    return tiles


@contextmanager
def _open(path: str) -> Iterator[Any]:
    try:
        import pypdfium2
    except ImportError as error:
        raise MediaError(f"{path}: PDF files need pypdfium2; install it with: pip install 'eagle-sampling[pdf]'") from error
    try:
        document = pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        raise MediaError(f"{path}: can't be read as a PDF: {error}") from error
    try:
        yield document
    except pypdfium2.PdfiumError as error:
        raise MediaError(f"{path}: {error}") from error
    finally:
        document.close()
