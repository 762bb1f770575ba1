"""Sections on stages: what is trained, for how long, and from which mixture of sources."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from .model import PARTS, Mode, Part
from .section import FOLDER_NAME, Section, Tokens


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
    name: str = Field(pattern=FOLDER_NAME, description="Name of the stage, in folders and metrics.")
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
        # A run folder's configuration has every default written out: what equals a default does not contradict anything.
        for part, settings in self.parts.items():
            if settings.train == "frozen" and part in self.train and self.train != list(PARTS):
                raise ValueError(f"train names {part}, and parts.{part}.train is frozen; keep one")
            given = {name for name, value in settings if name != "train" and value != PartConfig.model_fields[name].default}
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


def default_stages() -> list[StageConfig]:
    return [StageConfig(name=f"{n}k", max_tokens=n * 1024) for n in (32, 64, 128)]
