"""Sections on the model that a run starts from, and its parts."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from .section import FREE, Section

Part = Literal["vision", "connector", "language"]
PARTS: tuple[Part, ...] = ("vision", "connector", "language")
Mode = Literal["full", "lora", "frozen"]
"""How a part is trained in a stage: all of its parameters, low-rank adapters on its linear layers, or not at all."""


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
        description="Language model of a new model (Qwen2, Qwen2.5, Qwen3, Llama, SmolLM2, SmolLM3, Mistral), as a folder, a GGUF file or "
        "a hub name. Needs vision. Eagle's tokens are added to its tokenizer and the connector starts from random weights.",
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
    fp8: dict[Part, Literal["rowwise", "rowwise_with_gw_hp"]] = Field(
        json_schema_extra=FREE,
        default_factory=dict,
        description="Parts whose linear layers multiply 8-bit floats (e4m3, a scale for each row and column), for example {language: "
        "rowwise}; weights, activations, norms, embeddings and the language head keep their precision. rowwise: output and both "
        "gradients; rowwise_with_gw_hp: not the gradient of the weight, which is more exact and slower. Needs a GPU of compute capability "
        "8.9 (Ada, Hopper) and parallel.dtype: bfloat16; a CPU computes the same rounding slowly. Default: no part.",
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
    activations: Literal["auto", "keep", "recompute", "selective", "offload"] = Field(
        json_schema_extra=FREE,
        default="auto",
        description="Activation checkpointing. keep: all activations stay; recompute: each layer from its input; selective: each layer "
        "from its input and from what else fits the GPU (attention first, then projections, then the MLP); offload: each layer from its "
        "input, which waits in host memory; auto: selective on a GPU, or offload in stages that do not fit "
        "with it, and keep on a CPU. Gradients are the same.",
    )
    gpu_memory: float | None = Field(
        json_schema_extra=FREE,
        default=None,
        gt=0,
        description="GiB of each GPU that a step may be planned to need; selective keeps less to stay below. null: what is free when the "
        "run starts, less 8 % and 0.5 GiB.",
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

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        both = [part for part in self.fp8 if part in self.quantize]
        if both:
            raise ValueError(f"fp8.{both[0]}: quantize keeps the weights of {both[0]} in 4 bits, which are not multiplied in 8; keep one")
        return self

    @property
    def origin(self) -> str:
        """Where the model comes from, for people: the path, both parts, or the preset's name."""
        return self.path or (f"{self.vision} and {self.language}" if self.vision else self.preset or "tiny")
