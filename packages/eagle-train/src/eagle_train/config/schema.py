"""The configuration of a run: one pydantic model per section, every field with its unit, its default and why.

The descriptions end up in the JSON Schema, so an editor shows them. Unknown keys are errors (`load.py` names the nearest
right one). Defaults are the known settings of Eagle 2.5: AdamW at 2e-5, weight decay 0.05, 3 % warm-up, cosine, bf16, and
contexts of 32K, 64K and 128K tokens.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .evaluation import EvalConfig, TrackerConfig, tracker_of
from .model import PARTS, LoraConfig, ModelConfig, Part
from .section import FOLDER_NAME, FREE, Bytes, Section
from .sources import DataConfig
from .stages import StageConfig, default_stages
from .visual import PackingConfig, PromptConfig, SamplingConfig, TilingConfig


class RunConfig(Section):
    paths = ("dir",)
    name: str = Field(
        json_schema_extra=FREE, default="eagle", pattern=FOLDER_NAME, description="Name of the run; its folder is <dir>/<name>."
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
        default_factory=default_stages, min_length=1, description="Stages in order, each starting from the last one's weights."
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
    trackers: list[Annotated[TrackerConfig, BeforeValidator(tracker_of)]] = Field(
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
