"""The configuration of a run: one pydantic model per section, every field with its unit, its default and why.

The descriptions end up in the JSON Schema, so an editor shows them. Unknown keys are errors (`load.py` names the nearest
right one). Defaults are the known settings of Eagle 2.5: AdamW at 2e-5, weight decay 0.05, 3 % warm-up, cosine, bf16, and
contexts of 32K, 64K and 128K tokens.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from eagle_sampling.budget import STRATEGIES

from .addresses import Place, scheme_of

Part = Literal["vision", "connector", "language"]
PARTS: tuple[Part, ...] = ("vision", "connector", "language")
Mode = Literal["full", "lora", "frozen"]
"""How a part is trained in a stage: all of its parameters, low-rank adapters on its linear layers, or not at all."""

# Names of runs and stages are folders: no dot in front, which would hide them, or be the folder itself or the one above.
_FOLDER_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def _with_unit(units: dict[str, int], what: str) -> BeforeValidator:
    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in units:
            names = ", ".join(unit for unit in units if unit)
            raise ValueError(f"{value!r} is not a number of {what}; write a whole number, or one with a unit of: {names}")
        try:
            return round(float(match[1]) * units[match[2].lower()])
        except OverflowError:
            raise ValueError(f"{value!r} is not a number of {what}: it is too large") from None

    return BeforeValidator(parse)


Bytes = Annotated[int, _with_unit(_BYTE_UNITS, "bytes"), Field(ge=1)]
"""A number of bytes; `512MiB` and `2GB` are understood."""
Tokens = Annotated[int, _with_unit(_TOKEN_UNITS, "tokens"), Field(ge=1)]
"""A number of tokens; `32K` is 32768."""


COLUMNS = ("question", "answer", "messages", "conversations", "texts", "system", "data", "image", "images", "video", "videos")
COLUMNS += ("document", "documents", "start", "end", "fps")
"""Keys of a row that `columns` of a source can map."""

FREE: Any = {"resume": "free"}
"""Marks a field, or a section, that may change when a run is resumed: it says how the run is executed, not what is computed."""


class Section(BaseModel):
    """A section of the file: immutable, closed (no unknown keys), all numbers finite, defaults checked like given values.

    `paths` names the fields that are paths. They are resolved during validation by the function `resolve` of the validation context.
    `names` are those among them that can also be names on the Hugging Face hub, which stay as they are unless such a folder exists.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=False)
    paths: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ()

    @field_validator("*", mode="after")
    @classmethod
    def _resolve(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or info.field_name not in cls.paths or not info.context:
            return value
        resolve = info.context["resolve"]
        if isinstance(value, list):
            return [one if isinstance(one, Section) or scheme_of(one) else resolve(Path(one)) for one in value]
        if isinstance(value, Section) or scheme_of(value):
            return value
        resolved = resolve(Path(value))
        if info.field_name in cls.names and is_hub_name(str(value)) and not resolved.exists():
            return value
        return resolved if isinstance(value, Path) else str(resolved)

    def replaced(self, **values: Any) -> Self:
        """A new section with other (valid) values, which count as chosen by the user only where the old ones did."""
        return self.model_construct(_fields_set=set(self.model_fields_set), **({**self.__dict__} | values))


class RunConfig(Section):
    paths = ("dir",)
    name: str = Field(
        json_schema_extra=FREE, default="eagle", pattern=_FOLDER_NAME, description="Name of the run; its folder is <dir>/<name>."
    )
    dir: Path = Field(
        json_schema_extra=FREE, default=Path("runs"), description="Folder of the run folders; relative to the configuration file."
    )
    seed: int = Field(default=0, ge=0, description="Seed of everything random: order of packs, subsampling, initial weights.")
    log_every: int = Field(
        default=1,
        ge=1,
        description="Optimizer steps between two lines of metrics.",
        json_schema_extra=FREE,
    )
    deterministic: bool = Field(
        json_schema_extra=FREE,
        default=False,
        description="Bit for bit the same numbers again on a GPU: kernels add in one order, which costs some speed.",
    )

    @property
    def folder(self) -> Path:
        """The run folder: config.yaml, facts, plan, metrics.jsonl, ledger.jsonl, checkpoints/, plot.png, report."""
        return self.dir / self.name


def is_hub_name(value: str) -> bool:
    """Whether a value has the form of a name on the Hugging Face hub: `owner/name`, not a path that starts with `.`, `/` or `~`."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-][A-Za-z0-9._-]*", value) is not None


class LoraConfig(Section):
    """Adapters of one part: `W x + alpha / rank * B A x` (LoRA, arXiv 2106.09685, section 4.1), without dropout."""

    rank: int = Field(default=16, ge=1, description="Rows of A and columns of B.")
    alpha: float = Field(default=32.0, gt=0, description="The adapter's output is scaled by alpha / rank.")
    targets: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Last names of the linear layers that get adapters, for example [q_proj, v_proj]; null: all of the part, except the "
        "language head.",
    )


class ModelConfig(Section):
    paths = ("path", "vision", "language", "tokenizer", "adapter")
    names = ("path", "vision", "language", "tokenizer")
    preset: str | None = Field(
        default=None,
        description="Name of a model of eagle_model.PRESETS, started from random weights. Default: tiny, when neither path nor vision and "
        "language are given.",
    )
    path: str | None = Field(
        default=None,
        description="Checkpoint to start from (Eagle 2.5 layout): a folder, or a name on the Hugging Face hub (owner/name). Excludes "
        "preset, vision and language.",
    )
    vision: str | None = Field(
        default=None,
        description="Vision tower of a new model: a SigLIP or SigLIP2 of fixed resolution, as a folder or a hub name. Needs language.",
    )
    language: str | None = Field(
        default=None,
        description="Language model of a new model (Qwen2, Qwen2.5, Qwen3, Llama, SmolLM2, Mistral), as a folder, a GGUF file or a hub "
        "name. Needs vision. Eagle's tokens are added to its tokenizer and the connector starts from random weights.",
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Side of a tile in pixels for a new model of vision and language; position embeddings are resized (bicubic). "
        "null: the tower's own.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="Tokenizer, as a folder or a hub name; null: that of path or language. A preset needs one.",
    )
    lora: dict[Part, LoraConfig] = Field(
        default_factory=dict,
        description="Adapters by part (vision, connector, language), for parts that a stage trains as lora; default: rank 16, alpha 32.",
    )
    adapter: str | None = Field(
        default=None, description="Folder of an adapter in PEFT's format that training starts from; its ranks are those of lora."
    )
    quantize: dict[Part, Literal["nf4"]] = Field(
        default_factory=dict,
        description="Parts whose linear layers are kept frozen in 4 bits, for example {language: nf4} (QLoRA, arXiv 2305.14314); no stage "
        "trains them in full. Adapters, norms, embeddings and the language head keep their precision. Needs bitsandbytes (extra qlora).",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the trained weights, which eagle export --ema writes, for example 0.999; it takes 4 more "
        "bytes per trained parameter. null: none.",
    )
    weights: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Precision in which weights are kept while training. bfloat16 takes 4 bytes less per parameter (weight and gradient), "
        "rounds every update stochastically, and needs parallel.dtype: bfloat16 and the optimizer adamw or adamw8bit.",
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Fields of EagleConfig to change, nested as in config.json, for example {text_config: {...}}."
    )
    attention: str = Field(
        default="auto", description="Attention backend of eagle_cp by name; auto takes the fastest one that is installed."
    )
    activations: Literal["auto", "keep", "recompute", "offload"] = Field(
        json_schema_extra=FREE,
        default="auto",
        description="Activation checkpointing. keep: all activations stay; recompute: each layer from its input; offload: each layer from "
        "its input, which waits in host memory; auto: recompute on a GPU, keep on a CPU.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        parts = [name for name in ("vision", "language") if getattr(self, name) is not None]
        given = [f"{name} ({getattr(self, name)})" for name in ("preset", "path", *parts[:1]) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say which model to start from; keep one")
        if len(parts) == 1:
            missing = "language" if parts == ["vision"] else "vision"
            raise ValueError(f"{parts[0]} is given and {missing} is not; a new model needs both: add model.{missing}")
        if self.image_size is not None and not parts:
            raise ValueError(
                f"image_size ({self.image_size}) is for a new model of vision and language; the tile size of a preset is set by "
                "overrides: {vision_config: {image_size: ...}}, that of a checkpoint is fixed"
            )
        return self

    @property
    def origin(self) -> str:
        """Where the model comes from, for people: the path, both parts, or the preset's name."""
        return self.path or (f"{self.vision} and {self.language}" if self.vision else self.preset or "tiny")


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
        description="Share of a source's rows that may go to the ledger (10 rows always may, unless 0). Twice the share stops on the way.",
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
        json_schema_extra=FREE, default=None, ge=1, description="Processes of prepare; null: one per CPU once it takes long."
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


class PromptConfig(Section):
    system: str | None = Field(
        default=None, description="System message for rows that have none; null: the released processor's 'You are a helpful assistant.'"
    )


class SamplingConfig(Section):
    strategy: str = Field(
        default="ads",
        description="ads: text, then frames, then tiles (Eq. 2); ads-fill: what ADS leaves over goes to single images; "
        "uniform: a fixed number of frames, for comparison; or the name of a strategy registered with eagle_sampling.",
    )
    fps: float = Field(default=2.0, gt=0, description="Frames requested per second of video.")
    min_frames: int = Field(
        default=8,
        ge=1,
        description="N_min: a sample is dropped from the stage when one of its videos would get fewer frames than this and has more.",
    )
    max_frames: int | None = Field(default=None, ge=1, description="Most frames of one video or pages of one document; null: what fits.")
    placement: Literal["linspace", "center"] = Field(
        default="linspace", description="Where the frames lie: first to last frame, or the middle of equal parts."
    )

    @field_validator("strategy")
    @classmethod
    def _registered(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"no strategy is called {value!r}; registered are {', '.join(STRATEGIES)}")
        return value

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.max_frames is not None and self.max_frames < self.min_frames:
            raise ValueError(f"max_frames ({self.max_frames}) is below min_frames ({self.min_frames}); lower min_frames too")
        return self


class TilingConfig(Section):
    min_tiles: int = Field(default=1, ge=1, le=64, description="Fewest tiles of an image (without thumbnail).")
    max_tiles: int = Field(default=12, ge=1, le=64, description="Most tiles of an image (without thumbnail); the cap that ADS starts from.")
    thumbnail: bool = Field(default=True, description="Add the whole image as a last tile when there is more than one.")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.max_tiles < self.min_tiles:
            raise ValueError(f"max_tiles ({self.max_tiles}) is below min_tiles ({self.min_tiles})")
        return self


class PackingConfig(Section):
    share_media: bool = Field(
        default=False,
        description="true: rows of a source with the same media (references, clip bounds and text before them) have them in a pack once: "
        "one video, many questions. Loss and gradients are those of separate samples; frames are those that fit the longest of the rows.",
    )
    reserve: float = Field(
        default=0.0625,
        ge=0,
        lt=1,
        description="With share_media: the part of the context that media leave free for further questions about them. Without it a video "
        "that fills the context with one question would be in a pack per question. 0: frames are those of the longest row alone.",
    )


class PartConfig(Section):
    """How one part is trained in a stage."""

    train: Mode | None = Field(
        default=None,
        description="full: all parameters; lora: adapters on its linear layers (model.lora); frozen. null: full if the stage's train names "
        "it, else frozen.",
    )
    lr: float | None = Field(default=None, gt=0, description="Peak learning rate of the part; null: that of the stage.")
    weight_decay: float | None = Field(default=None, ge=0, description="Weight decay of the part; null: that of the stage.")
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor of the learning rate from each layer to the one below it: of L layers, layer i (from 0) learns at "
        "layer_decay^(L - i) times the part's rate, embeddings at layer_decay^(L + 1) times.",
    )


class MixtureConfig(Section):
    """Which share of an epoch each source has: by weight, by size with a temperature, or as tokens."""

    weights: dict[str, float] | None = Field(
        default=None,
        min_length=1,
        description="Relative share of each source, for example {chat: 3, video: 1}; other sources are not used. null: with temperature, "
        "the recipe's weights.",
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="Shares are proportional to weight x size^(1/temperature): 1 keeps the sizes of the sources, larger values even them "
        "out. null: shares are the weights, whatever the sizes.",
    )
    tokens: dict[str, Tokens] | None = Field(
        default=None,
        min_length=1,
        description="Tokens of each source in an epoch, for example {chat: 20M, video: 80M} (M is 2^20); other sources are not used. "
        "Excludes the other keys.",
    )
    count: Literal["tokens", "samples"] = Field(default="tokens", description="What shares and sizes count.")
    size: Tokens | None = Field(
        default=None,
        description="Tokens of an epoch (samples, with count: samples); null: as many as the sources of the mixture have together.",
    )

    @field_validator("weights")
    @classmethod
    def _positive(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return positive_weights(value)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.weights is None and self.temperature is None and self.tokens is None:
            raise ValueError("says nothing about shares; give weights, temperature or tokens")
        given = [name for name in ("weights", "temperature", "size") if getattr(self, name) is not None]
        if self.tokens is not None and (given or self.count == "samples"):
            other = given[0] if given else "count: samples"
            raise ValueError(f"tokens and {other} both say how much of each source an epoch has; keep one")
        return self


def positive_weights(weights: dict[str, float] | None) -> dict[str, float] | None:
    """The weights of sources by name; raises ValueError for one that is not above 0."""
    for name, weight in (weights or {}).items():
        if not weight > 0:
            raise ValueError(f"weight of source {name!r} is {weight}; it must be above 0; to exclude a source, remove it here")
    return weights


class StageConfig(Section):
    name: str = Field(pattern=_FOLDER_NAME, description="Name of the stage, in folders and metrics.")
    max_tokens: Tokens = Field(description="Context length L_max: budget of a sample and length of a pack, in tokens (32K is 32768).")
    epochs: float | None = Field(default=None, gt=0, description="Passes over the rows; excludes steps. 1 when neither is given.")
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps, starting further epochs as needed; excludes epochs.")
    packs_per_step: int = Field(default=32, ge=1, description="Packs of one optimizer step over all ranks; accumulation follows from it.")
    train: list[Part] = Field(
        default_factory=lambda: list(PARTS),
        min_length=1,
        description="Parts of which all parameters are trained: vision, connector, language; the others are frozen unless parts says "
        "otherwise.",
    )
    parts: dict[Part, PartConfig] = Field(
        default_factory=dict,
        description="Settings by part, for example {vision: {lr: 2.0e-6}, language: {train: lora, lr: 1.0e-4}}.",
    )
    sources: dict[str, float] | None = Field(
        default=None,
        description="Weight of each source in this stage, in place of the recipe's weight; other sources are not used.",
    )
    mixture: MixtureConfig | None = Field(
        default=None,
        description="Share of each source in an epoch of this stage, by weight, temperature or tokens; excludes sources. null: every "
        "source comes as often as its repeat_time and weight say.",
    )
    loss_weighting: Literal["token", "sample", "sqrt"] = Field(
        default="sqrt",
        description="token: every label alike; sample: every sample alike; sqrt: n_i^-1/2 per label of sample i, as the original.",
    )
    optimizer: Literal["adamw", "adamw8bit", "adamw_host", "muon", "adafactor"] = Field(
        default="adamw",
        description="adamw: 8 bytes of state per parameter; adamw8bit: 2 (needs torchao); adamw_host: adamw with its 8 bytes in host "
        "memory, copied while others are updated; muon: 4 for matrices of linear layers, which get "
        "orthogonalised momentum, and AdamW for the rest; adafactor: factored second moment, next to none.",
    )
    carry_optimizer: bool = Field(
        default=False,
        description="Start with the optimizer state of the stage before, for the parameters that both train; false: fresh state.",
    )
    lr: float = Field(default=2e-5, gt=0, description="Peak learning rate.")
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="Learning rate at the end over the peak (cosine and linear).")
    schedule: Literal["cosine", "constant", "linear"] = Field(default="cosine", description="Shape of the learning rate after warm-up.")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the stage's steps in which the learning rate rises.")
    weight_decay: float = Field(default=0.05, ge=0, description="Decoupled weight decay; norms and biases have none.")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's betas.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    grad_clip: float | None = Field(default=1.0, gt=0, description="Largest global norm of the gradient; null: no clipping.")

    @field_validator("sources")
    @classmethod
    def _positive(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return positive_weights(value)

    @field_validator("betas")
    @classmethod
    def _beta_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas {value} must lie in [0, 1)")
        return value

    @property
    def modes(self) -> dict[Part, Mode]:
        """How every part is trained in this stage."""
        named = {part: settings.train for part, settings in self.parts.items() if settings.train is not None}
        return {part: named.get(part, "full" if part in self.train else "frozen") for part in PARTS}  # pyright: ignore[reportReturnType]

    @model_validator(mode="after")
    def _one_choice_per_part(self) -> Self:
        for part, settings in self.parts.items():
            if settings.train == "frozen" and "train" in self.model_fields_set and part in self.train:
                raise ValueError(f"train names {part}, and parts.{part}.train is frozen; keep one")
            given = settings.model_fields_set - {"train"}
            if self.modes[part] == "frozen" and given:
                raise ValueError(f"parts.{part}: {', '.join(sorted(given))} has no effect, since {part} is frozen; add it to train")
        if set(self.modes.values()) == {"frozen"}:
            raise ValueError("every part is frozen; name at least one in train")
        return self

    @property
    def source_weights(self) -> dict[str, float] | None:
        """Weights of the sources that the stage names (tokens, where its mixture states them); None: every source has the recipe's."""
        if self.mixture is None:
            return self.sources
        return dict(self.mixture.tokens) if self.mixture.tokens is not None else self.mixture.weights

    @model_validator(mode="after")
    def _one_choice_of_sources(self) -> Self:
        if self.sources is not None and self.mixture is not None:
            raise ValueError("sources and mixture both say how often sources come; keep one")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs ({self.epochs}) and steps ({self.steps}) both say how long; keep one")
        return self


class CheckpointConfig(Section):
    every: int = Field(default=500, ge=1, description="Optimizer steps between checkpoints; the end of a stage always makes one.")
    minutes: float | None = Field(
        default=60.0, gt=0, description="Minutes after which the running step is followed by a checkpoint, next to every; null: only every."
    )
    keep: int = Field(default=2, ge=1, description="Newest checkpoints kept within a stage; ends of stages are always kept.")
    background: bool = Field(
        default=True,
        description="Write while training goes on, from a copy of the rank's weights and optimizer state in host memory; false: steps wait "
        "until a checkpoint is written, and no copy is made.",
    )


class ParallelConfig(Section):
    data: int | None = Field(default=None, ge=1, description="Groups that read different packs; null: ranks / (ulysses * all_gather).")
    ulysses: int = Field(default=1, ge=1, description="Ranks of the inner level of context parallelism (all-to-all over heads).")
    all_gather: int = Field(default=1, ge=1, description="Ranks of the outer level of context parallelism (all-gather of keys and values).")
    context: Literal["fixed", "auto"] = Field(
        default="fixed",
        description="How the ulysses * all_gather ranks of a group share a pack. fixed: as these two numbers say; auto: for every pack the "
        "fastest split of that many ranks, which may also leave all samples whole (packs of short samples).",
    )
    fsdp: bool = Field(
        default=True, description="Shard parameters over the ranks (FSDP2) when there is more than one; false: replicate them."
    )
    replicate: int = Field(
        default=1,
        ge=1,
        description="Replicas of the sharded parameters (HSDP): parameters are gathered within ranks / replicate neighbouring ranks, and "
        "only sums of gradients cross between replicas. The number of machines keeps gathering within each of them.",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Precision of the computation; master weights stay float32. auto: bfloat16 on GPUs and CPUs that compute it natively "
        "(AVX512-BF16, AMX), else float32; a run that continues keeps what it began with.",
    )

    @model_validator(mode="after")
    def _one_way_to_replicate(self) -> Self:
        if self.replicate > 1 and not self.fsdp:
            raise ValueError(f"replicate ({self.replicate}) is for sharded parameters, and fsdp: false replicates all of them; keep one")
        return self

    @property
    def group_size(self) -> int:
        """Ranks that share one pack."""
        return self.ulysses * self.all_gather

    @model_validator(mode="after")
    def _something_to_split(self) -> Self:
        if self.context == "auto" and self.group_size == 1:
            raise ValueError(
                "context is auto, and ulysses * all_gather is 1: no pack is shared; set all_gather to the number of ranks that share a pack"
            )
        return self


class LoaderConfig(Section):
    workers: int = Field(default=2, ge=0, description="Processes per rank that read media; 0: in the training process.")
    prefetch: Bytes = Field(default=2**30, description="Bytes of finished batches waiting per rank (512MiB, 2GB).")


MetricName = Literal["exact", "choice", "contains", "anls", "numeric", "temporal_iou", "f1", "judge", "teacher_forced", "likelihood"]


class JudgeConfig(Section):
    base_url: str = Field(
        pattern=r"^https?://", description="Address of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1."
    )
    model: str = Field(min_length=1, description="Name of the model there.")
    key_variable: str = Field(default="OPENAI_API_KEY", description="Environment variable of the key; without it no key is sent.")
    parallel: int = Field(default=8, ge=1, description="Requests at once.")
    timeout: float = Field(default=60.0, gt=0, description="Seconds that a request may take.")
    attempts: int = Field(default=5, ge=1, description="Attempts of a request when the server is busy or not reachable.")
    max_tokens: int = Field(default=512, ge=1, description="Longest reply in tokens; models that reason first need room.")


class EvalConfig(Section):
    every: int | None = Field(default=None, ge=1, description="Optimizer steps between evaluations; null: at the end of every stage.")
    limit: int | None = Field(default=None, ge=1, description="Rows used, the first ones of each source; null: all.")
    batch_size: int = Field(default=16, ge=1, description="Questions of one batch.")
    max_new_tokens: int = Field(default=32, ge=1, description="Longest answer in tokens.")
    metrics: dict[str, MetricName] = Field(
        default_factory=dict,
        description="Metric of each held-out source; others: exact. exact, contains, anls, numeric, temporal_iou and f1 compare the "
        "generated answer. choice: the option it names, right only if right in all rotations. judge: by eval.judge; teacher_forced: right "
        "when every answer token is the most likely one; likelihood: the most likely option. The last two generate nothing.",
    )
    loss: bool = Field(
        default=True,
        description="Compute the validation loss of every held-out source: all assistant turns, teacher-forced, in packs.",
    )
    judge: JudgeConfig | None = Field(default=None, description="The server of the metric judge.")


def _tracker(value: Any) -> Any:
    """`wandb` and `{wandb: {project: p}}` as the section that they stand for."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and len(value) == 1 and "name" not in value:
        [(name, options)] = value.items()
        return {"name": name, "options": options or {}}
    return value


class TrackerConfig(Section):
    """A program that shows the metrics of the run, in addition to metrics.jsonl."""

    name: Literal["tensorboard", "wandb", "mlflow", "trackio"] = Field(description="Which one.")
    options: dict[str, Any] = Field(default_factory=dict, description="Its own options, for example {project: p, mode: offline} of wandb.")


def _default_stages() -> list[StageConfig]:
    return [StageConfig(name=f"{n}k", max_tokens=n * 1024) for n in (32, 64, 128)]


class Config(Section):
    """A run: what is trained, on what, in which stages, and where it is kept."""

    run: RunConfig = Field(default_factory=RunConfig, description="Name, folder and seed.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The model to start from.")
    data: DataConfig = Field(default_factory=DataConfig, description="Sources, held-out sources and limits.")
    prompt: PromptConfig = Field(default_factory=PromptConfig, description="The prompt.")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="How many frames and which (ADS).")
    tiling: TilingConfig = Field(default_factory=TilingConfig, description="How images are cut (IAP).")
    packing: PackingConfig = Field(default_factory=PackingConfig, description="How samples become packs.")
    stages: list[StageConfig] = Field(
        default_factory=_default_stages, min_length=1, description="Stages in order, each starting from the last one's weights."
    )
    checkpoint: CheckpointConfig = Field(
        json_schema_extra=FREE, default_factory=CheckpointConfig, description="When to save and what to keep."
    )
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig,
        description="How ranks share the work.",
        json_schema_extra=FREE,
    )
    loader: LoaderConfig = Field(
        default_factory=LoaderConfig,
        description="Reading of media while training.",
        json_schema_extra=FREE,
    )
    trackers: list[Annotated[TrackerConfig, BeforeValidator(_tracker)]] = Field(
        default_factory=list,
        description="Programs that show the metrics, next to metrics.jsonl, which is always written: tensorboard, wandb, mlflow, trackio; "
        "by name or with options: [tensorboard, {wandb: {project: p, mode: offline}}].",
        json_schema_extra=FREE,
    )
    eval: EvalConfig = Field(
        default_factory=EvalConfig,
        description="Evaluation on held-out rows: metrics, validation loss.",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _stage_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages share a name: {', '.join(twice)}; names are folders, give each its own")
        return self

    @model_validator(mode="after")
    def _adapters_are_used(self) -> Self:
        unused = [part for part in self.model.lora if part not in self.adapters]
        if unused:
            raise ValueError(f"model.lora.{unused[0]}: no stage trains {unused[0]} as lora; set stages.N.parts.{unused[0]}.train: lora")
        if self.model.adapter is not None and not self.adapters:
            raise ValueError("model.adapter: no stage trains a part as lora; set stages.N.parts.PART.train: lora")
        return self

    @model_validator(mode="after")
    def _what_is_quantized_is_frozen(self) -> Self:
        for part in self.model.quantize:
            trained = [stage.name for stage in self.stages if stage.modes[part] == "full"]
            if trained:
                raise ValueError(
                    f"model.quantize.{part}: stage {trained[0]} trains {part} in full, and weights in 4 bits stay as they are; set "
                    f"stages.N.parts.{part}.train to lora or frozen in every stage"
                )
        return self

    @model_validator(mode="after")
    def _carried_state_fits(self) -> Self:
        for number, stage in enumerate(self.stages):
            before = self.stages[number - 1] if number else None
            if stage.carry_optimizer and before is None:
                raise ValueError(f"stages.{stage.name}.carry_optimizer: the first stage has none before it; set it to false")
            if stage.carry_optimizer and before is not None and before.optimizer != stage.optimizer:
                raise ValueError(
                    f"stages.{stage.name}.carry_optimizer: the state of {before.optimizer} (stage {before.name}) is not that of "
                    f"{stage.optimizer}; use one optimizer, or set it to false"
                )
        return self

    @property
    def adapters(self) -> dict[Part, LoraConfig]:
        """The adapters of parts that a stage trains as lora. They are in the model in every stage, and zero until trained."""
        used = [part for part in PARTS if any(stage.modes[part] == "lora" for stage in self.stages)]
        return {part: self.model.lora.get(part, LoraConfig()) for part in used}  # pyright: ignore[reportArgumentType, reportCallIssue, reportReturnType]

    @property
    def max_tokens(self) -> int:
        """The longest context of all stages, in tokens."""
        return max(stage.max_tokens for stage in self.stages)

    @property
    def facts_folder(self) -> Path:
        """Where prepare keeps its facts."""
        return self.data.facts or self.run.folder / "facts"

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of the file, for editors (`# yaml-language-server: $schema=...`)."""
        return cls.model_json_schema()
