"""Images by reference (path, bytes, LMDB key): sizes from headers (`header`), encoded bytes (`reference`), pixels (`read`)."""

from .read import decoding, image_size, open_image, open_lazily
from .reference import ImageRef, describe, exists, read_bytes
from .tar import find_member

__all__ = ["ImageRef", "decoding", "describe", "exists", "find_member", "image_size", "open_image", "open_lazily", "read_bytes"]
