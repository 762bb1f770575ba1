"""Keys of rows: which are used, which are refused, and which are metadata that changes nothing.

The rule. A key that is used is in one of the tables here. A key that is not used is refused when its name is one that people give to
media or to instructions about training, or when its value looks like a medium: bytes, or a path with the suffix of an image, video or
document; next to a video also when it looks like a bound of a clip (`clips`). Every other key (`id`, `source`, `width`, ...) is metadata;
`eagle data lint` lists them. Values that say nothing (null, empty lists and texts) are as if the key was not there. `ignore` of a source
names keys that are metadata whatever the rule says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .clips import ENDS, RATES, STARTS, looks_like_a_bound
from .errors import RowError

KINDS = ("image", "video", "document")
TURNS = ("conversations", "messages")
MEDIA = {kind: (kind, f"{kind}s", f"{kind}_list") for kind in KINDS}
SYSTEM = ("system", "system_prompt", "system_message")
LOSS = ("loss", "train", "trainable", "weight", "loss_mask", "loss_weight")
"""Keys of a turn that say whether it is learned: true, 1, false or 0."""

ROW_KEYS = frozenset({"data", "texts", *SYSTEM, *RATES, *TURNS, *STARTS, *ENDS, *(key for names in MEDIA.values() for key in names)})

_MEDIA_NAMES = (
    "img",
    "imgs",
    "img_path",
    "img_paths",
    "image_path",
    "image_paths",
    "image_file",
    "image_files",
    "image_url",
    "image_urls",
    "pic",
    "pics",
    "picture",
    "pictures",
    "photo",
    "photos",
    "pdf",
    "pdfs",
    "pdf_path",
    "doc",
    "docs",
    "doc_path",
    "file",
    "files",
    "media",
    "medium",
    "clip",
    "clips",
    "segment",
    "frame",
    "frames",
    "frame_list",
    "frame_paths",
    "video_path",
    "video_paths",
    "video_file",
    "video_files",
    "video_url",
    "audio",
    "audios",
    "audio_path",
    "sound",
    "sounds",
    "speech",
    "voice",
    "page_images",
)
_TRAINING_NAMES = (
    "loss",
    "train",
    "trainable",
    "loss_mask",
    "loss_weight",
    "weight",
    "sample_weight",
    "label_mask",
    "instruction",
    "instructions",
    "labels",
    "history",
    "tools",
    "functions",
    "chosen",
    "rejected",
    "rejected_response",
    "tool_calls",
    "function_call",
    "reasoning_content",
)
_REFUSED = frozenset(_MEDIA_NAMES + _TRAINING_NAMES)
_MEDIA_PATH = re.compile(
    r"\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|jp2|heic|avif|mp4|m4v|mov|mkv|webm|avi|flv|wmv|mpe?g|pdf|wav|mp3|flac|ogg|m4a)$|^data:\w+/",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one source are written, next to what this package knows itself.

    columns: (key of a row as Eagle knows it, name of the column that has it). ignore: columns that are metadata. question: the question of
    rows that have only an answer. media: folder for videos and documents that are taken out of tar files and columns. on_damage: what
    becomes of damaged frames of its videos.
    """

    columns: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    question: str | None = None
    media: str | None = None
    on_damage: Literal["refuse", "conceal"] = "refuse"


def says_nothing(value: Any) -> bool:
    """Whether a value is null, an empty text, list or mapping, or a list of nulls."""
    if isinstance(value, list | tuple):
        return all(item is None for item in value)
    return value is None or (isinstance(value, str | bytes | Mapping) and not value)


def without_nulls(value: Any) -> Any:
    """The value without the keys of its mappings that are null, at any depth: tables fill what a row doesn't have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def with_columns(row: Mapping[str, Any], form: RowFormat) -> dict[str, Any]:
    """The row with its columns under the keys that Eagle knows; raises RowError for a key that the row has already."""
    taken = {column for _, column in form.columns} | set(form.ignore)
    result = {key: value for key, value in row.items() if key not in taken}
    for key, column in form.columns:
        if column not in row:
            continue
        if result.get(key) is not None:
            raise RowError("bad-row", f"has {key!r} and, for the same, the column {column!r}; columns of the source may name one of them")
        result[key] = row[column]
    return result


def check_keys(keys: Mapping[str, Any], used: Collection[str], where: str, *, with_video: bool = False) -> None:
    """Raise RowError for a key that isn't used and isn't metadata. with_video: a video is where the keys are."""
    for key in unused_keys(keys, used):
        if is_refused(key, value := keys[key], with_video=with_video):
            shown = f"<{len(value)} bytes>" if isinstance(value, bytes) else short(value)
            raise RowError(
                "unknown-key",
                f"{where} has {key!r} = {shown}, which nothing reads and which may change what the row means; name its meaning in columns "
                "of the source, or name it in ignore",
            )


def unused_keys(keys: Iterable[str], used: Collection[str]) -> list[str]:
    """Keys that nothing reads."""
    return [key for key in keys if key not in used]


def is_refused(key: str, value: Any, *, with_video: bool = False) -> bool:
    """Whether a key that nothing reads may change the meaning of its row; see the module. with_video: the row has a video."""
    if says_nothing(value):
        return False
    return key.lower() in _REFUSED or _is_medium(value) or (with_video and looks_like_a_bound(key, value))


def has_video(row: Mapping[str, Any], form: RowFormat) -> bool:
    """Whether a row names a video of its own, in a key or in an entry of `data`."""
    columns = [column for key, column in form.columns if key in MEDIA["video"]]
    entries = row["data"] if isinstance(row.get("data"), list) else []
    return any(not says_nothing(row.get(key)) for key in (*MEDIA["video"], *columns)) or any(
        isinstance(entry, Mapping) and entry.get("type") == "video" for entry in entries
    )


def _is_medium(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_medium, value[:4]))
    if isinstance(value, Mapping):
        return any(_is_medium(value.get(key)) for key in ("bytes", "path", "url", "tar", "lmdb_file")) or "lmdb_file" in value
    if isinstance(value, bytes):
        return True
    return isinstance(value, str) and len(value) < 4096 and "\n" not in value and _MEDIA_PATH.search(value) is not None


def short(value: Any) -> str:
    """The value for a message, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
