"""Sections on data: sources, annotations and where they are, limits, remote storage."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from .addresses import Place, scheme_of
from .section import FREE, Bytes, Section, is_hub_name

COLUMNS = ("question", "answer", "messages", "conversations", "texts", "system", "data", "image", "images", "video", "videos")
COLUMNS += ("document", "documents", "start", "end", "fps")
"""Keys of a row that `columns` of a source can map."""


class HubDataset(Section):
    """A dataset of the Hugging Face hub, read by the library datasets."""

    hub: str = Field(description="Name of the dataset, for example HuggingFaceM4/ChartQA.")
    subset: str | None = Field(default=None, description="Its configuration; null: the default one.")
    split: str = Field(default="train", pattern=r"^[A-Za-z0-9_.-]+$", description="Its split, whole: train, not train[:100].")
    revision: str | None = Field(default=None, description="Commit, tag or branch; null: main, whatever it is on that day.")

    @field_validator("hub")
    @classmethod
    def _named(cls, value: str) -> str:
        if not is_hub_name(value):
            raise ValueError(f"{value!r} is not the name of a dataset, which has the form owner/name")
        return value

    def __str__(self) -> str:
        return "/".join(filter(None, (self.hub, self.subset, self.split)))


def _kind(value: Any) -> str:
    """Which of the forms of `annotation` a value has, so that errors are about this one."""
    return "list" if isinstance(value, list) else "dataset" if isinstance(value, dict | HubDataset) else "path"


_One = Annotated[Annotated[HubDataset, Tag("dataset")] | Annotated[Place, Tag("path")], Discriminator(_kind)]
Annotation = Annotated[
    Annotated[HubDataset, Tag("dataset")] | Annotated[Place, Tag("path")] | Annotated[list[_One], Tag("list")], Discriminator(_kind)
]
"""A file, pattern, folder, address or dataset of the hub, or a list of these."""


class Source(Section):
    """One entry of a recipe."""

    paths = ("annotation", "root")
    annotation: Annotation = Field(
        description="File of rows: JSONL, a JSON array, CSV, TSV (each also .gz, .zst, .bz2, .xz), Parquet, Arrow, or a WebDataset tar; a "
        "folder of Parquet, Arrow or tar files (a saved datasets dataset); a pattern such as shards/*.parquet; an address of any of these "
        "(s3://bucket/rows.jsonl, see data.remote); a dataset of the Hugging Face hub as {hub: owner/name, subset: ..., split: train, "
        "revision: ...}; or a list of these."
    )
    root: Place | None = Field(
        default=None,
        description="Folder or address that the media paths of the rows start from; null: the annotation's folder, of a dataset of the hub "
        "its repository.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Columns of the rows that have other names, as {key of a row: column}, for example {question: prompt, answer: reply, "
        "image: picture}. Keys: question, answer, messages, conversations, system, image, video, document, data, start, end, fps.",
    )
    ignore: list[str] = Field(
        default_factory=list, description="Keys of the rows that are metadata, though their names or values look like media."
    )
    question: str | None = Field(
        default=None, description="Question of rows that have an answer (columns.answer) and no question, for example captions."
    )
    repeat_time: float = Field(
        default=1.0,
        gt=0,
        description="How often an epoch uses each row: 3 uses all three times, 0.25 uses a quarter (the same rows in every epoch and "
        "on every rank, chosen by seed), 1.5 all once and half of them twice.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="Multiplies repeat_time when a stage draws its rows, other rows staying as they are: 2 doubles this source's share "
        "against the others. Unlike repeat_time's, a fractional part is drawn anew in every epoch.",
    )
    max_dynamic_tiles: int | None = Field(
        default=None, ge=1, le=64, description="Most tiles an image of this source may have; null: tiling.max_tiles."
    )
    on_damage: Literal["refuse", "conceal"] = Field(
        default="refuse",
        description="Samples with damaged frames of a video file. refuse: not used, and in the ledger; conceal: the picture that the "
        "decoder makes of such a frame is used, as players do, and the sample is listed in the ledger and counted in the metrics.",
    )

    @property
    def stem(self) -> str:
        """The name that the annotation gives: of its (first) file or dataset, without suffix."""
        first = self.annotation[0] if isinstance(self.annotation, list) else self.annotation
        return PurePosixPath(str(first).partition("?")[0] if scheme_of(first) else str(first)).stem

    @property
    def schemes(self) -> set[str]:
        """Of the addresses of annotation and root."""
        named = [*(self.annotation if isinstance(self.annotation, list) else [self.annotation]), self.root]
        return {scheme for place in named if (scheme := scheme_of(place)) is not None}

    @field_validator("annotation")
    @classmethod
    def _some_file(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("is an empty list; name at least one file")
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value:
            if key not in COLUMNS:
                raise ValueError(f"{key!r} is not a key of a row; known are {', '.join(COLUMNS)}")
        return value


class LimitsConfig(Section):
    max_bad_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of a source's rows that may go to the ledger (10 rows always may, unless 0, but not all unless 1). Twice the "
        "share stops on the way.",
    )
    max_bad_rows: int | None = Field(default=None, ge=0, description="Bad rows over all sources that stop prepare; null: no such limit.")
    max_pixels: int = Field(
        default=178_956_970,
        ge=1,
        le=178_956_970,
        description="Largest image in pixels; the default is Pillow's own limit.",
    )
    max_bytes: Bytes = Field(default=2**28, description="Largest image file in bytes.")
    max_frames: int = Field(default=1_000_000, ge=1, description="Most frames of a video file.")
    max_line_bytes: Bytes = Field(
        default=2**26, description="Longest line of an annotation file in bytes; a longer one goes to the ledger unread."
    )


class RemoteConfig(Section):
    """Files that are read by address. Nothing is fetched unless its scheme is named here."""

    paths = ("cache",)
    schemes: list[str] = Field(
        default_factory=list,
        description="Schemes of addresses that are read, for example [s3, https]: s3, gs, hf, http, https and others that fsspec knows. "
        "Empty: none. Credentials come from the environment's standard places.",
    )
    anonymous: bool = Field(default=False, description="Read s3:// and gs:// without credentials (public buckets).")
    endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^@?]+$",
        description="Address of an S3-compatible server; null: AWS_ENDPOINT_URL, else Amazon's.",
    )
    cache: Path | None = Field(
        default=None, description="Folder of the pieces that were fetched, best on a local disk; null: ~/.cache/eagle (or XDG_CACHE_HOME)."
    )
    cache_bytes: Bytes = Field(
        default=20 * 2**30,
        description="Size of the cache, which all processes of the host share; what was not used for longest goes first.",
    )
    retries: int = Field(
        default=6, ge=0, description="Attempts after a request that failed for a reason that may pass; waits grow from 0.5 to 30 s."
    )
    timeout: float = Field(default=60.0, gt=0, description="Seconds without a byte after which a request has failed.")
    check_after: float = Field(
        default=3600.0,
        ge=0,
        description="Seconds for which a process takes a file's size and ETag as still true.",
    )

    @field_validator("schemes")
    @classmethod
    def _schemes(cls, value: list[str]) -> list[str]:
        for scheme in value:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme) or scheme in ("file", "local"):
                raise ValueError(f"{scheme!r} is not a scheme of remote files; write it as in s3://, without the ://")
        return value


class DataConfig(Section):
    paths = ("recipe", "eval_recipe", "facts")
    recipe: Path | None = Field(default=None, description="Recipe file (YAML, or the originals' JSON); excludes sources.")
    sources: dict[str, Source] = Field(default_factory=dict, description="The recipe written here, by source name.")
    eval_recipe: Path | None = Field(default=None, description="Recipe of the held-out rows; excludes eval_sources.")
    eval_sources: dict[str, Source] = Field(default_factory=dict, description="Held-out sources, by name.")
    facts: Path | None = Field(default=None, description="Folder of prepared facts, may be shared between runs; null: <run folder>/facts.")
    workers: int | None = Field(
        json_schema_extra=FREE, default=None, ge=1, description="Processes of prepare; null: at most one per CPU, once it takes long."
    )
    verify: Literal["header", "ends", "decode"] = Field(
        default="ends",
        description="How prepare checks images and videos: header (sizes only), ends (also that the file is whole to its end, cheap), "
        "decode (every image is decoded and the last frame of every video is read).",
    )
    shard_rows: int = Field(default=2048, ge=1, description="Rows of a facts file: what a kill costs each worker at most.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="When to refuse a file, and when to stop.")
    remote: RemoteConfig = Field(
        default_factory=RemoteConfig, json_schema_extra=FREE, description="Files that are read by address (s3://, https://, ...)."
    )

    @model_validator(mode="after")
    def _one_recipe(self) -> Self:
        for recipe, sources, names in (
            (self.recipe, self.sources, ("recipe", "sources")),
            (self.eval_recipe, self.eval_sources, ("eval_recipe", "eval_sources")),
        ):
            if recipe is not None and sources:
                raise ValueError(f"{names[0]} ({recipe}) and {names[1]} both say what to read; keep one")
        return self
