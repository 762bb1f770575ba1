"""What a decoder is made of, read from the Hugging Face configuration of its family.

A dense family is one row of `FAMILIES`. A trait is a constant of the family, or the name of the configuration's field that holds it. What a
configuration has and the decoder does not is refused by name, never ignored. This file does not import torch.
"""

from dataclasses import dataclass
from typing import Any

#: Fields that scale, cap or route something which this decoder does not, and the values under which they change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1.0),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1.0),
}


@dataclass(frozen=True)
class Family:
    """A row of the table. `architecture`: the class that `text_config.architectures[0]` names; traits: a constant, or a field's name.

    rotated: the field that states for each layer whether its queries and keys are rotated (0 or 1); None: all are.
    """

    architecture: str
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    rotated: str | None = None


#: Families by `model_type`.
FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),  # also Qwen2.5
    "qwen3": Family("Qwen3ForCausalLM", qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True),
    "llama": Family("LlamaForCausalLM", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),  # also SmolLM2
    "mistral": Family("MistralForCausalLM"),
    "smollm3": Family(
        "SmolLM3ForCausalLM", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias", rotated="no_rope_layers"
    ),
}

_GEMMA = "norms that multiply by 1 + weight, scaled embeddings, a GELU gate"
#: What families without a row have that the decoder does not, by `model_type`.
NOT_COVERED: dict[str, str] = {
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}, norms after attention and MLP, attention windows, soft caps of logits",
    "gemma3": f"{_GEMMA}, norms after attention and MLP, attention windows with a rotation of their own",
    "gemma3_text": f"{_GEMMA}, norms after attention and MLP, attention windows with a rotation of their own",
}


def unknown_family(name: str, model_type: str) -> str:
    """Why a language model cannot be used, and what can. name: as its configuration spells it."""
    lacks = NOT_COVERED.get(model_type)
    reason = f": the decoder does not implement its {lacks}" if lacks else ""
    return (
        f"the language model {name!r} is not supported{reason}; supported are {', '.join(f.architecture for f in FAMILIES.values())} "
        "(Qwen2, Qwen2.5, Qwen3, Llama 3, SmolLM2, SmolLM3, Mistral), for example HuggingFaceTB/SmolLM3-3B or Qwen/Qwen3-1.7B"
    )


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and traits of a decoder. head_dim: width of an attention head. norm_eps: epsilon of every RMSNorm.

    qkv_bias, out_bias, mlp_bias: biases of the query, key and value projections, of the output projection, and of the three projections
    of the MLP. qk_norm: RMSNorm over each head of queries and keys, before the rotation. rotated: whether a layer rotates queries and
    keys by their positions, for each layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rotated: tuple[bool, ...]

    @property
    def vectors(self) -> int:
        """Elements of the biases and QK-norms of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.qkv_bias * (queries + 2 * keys) + self.out_bias * self.hidden_size + self.qk_norm * 2 * self.head_dim
        return attention + self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)


def decoder_spec(config: Any) -> DecoderSpec:
    """The decoder that a `text_config` describes.

    Raises ValueError, naming the field, for a family without a row and for what no decoder of this package does: windowed or chunked
    attention, another activation than SiLU, attention dropout, multipliers and caps (`UNSUPPORTED`).
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"text_config: {unknown_family(config.model_type, config.model_type)}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"text_config.layer_types has {', '.join(sorted(kinds))}; only full_attention is supported")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and getattr(config, "layer_types", None) is None:
        raise ValueError(f"text_config.sliding_window is {window}; attention windows are not supported, set it to null where weights allow")
    if config.hidden_act != "silu":
        raise ValueError(f"text_config.hidden_act is {config.hidden_act!r}; only 'silu' is supported")
    if config.attention_dropout:
        raise ValueError(f"text_config.attention_dropout is {config.attention_dropout}; dropout is not supported, set it to 0")
    for name, neutral in UNSUPPORTED.items():
        if name != family.rotated and getattr(config, name, None) not in neutral:
            raise ValueError(f"text_config.{name} is {getattr(config, name)}; the decoder does not implement it")

    def trait(name: str) -> bool:
        value = getattr(family, name)
        return bool(getattr(config, value, False)) if isinstance(value, str) else value

    rotated = (True,) * config.num_hidden_layers if family.rotated is None else tuple(map(bool, getattr(config, family.rotated)))
    if len(rotated) < config.num_hidden_layers:
        raise ValueError(f"text_config.{family.rotated} is for {len(rotated)} layers; the model has {config.num_hidden_layers}")
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        norm_eps=config.rms_norm_eps,
        qkv_bias=trait("qkv_bias"),
        out_bias=trait("out_bias"),
        mlp_bias=trait("mlp_bias"),
        qk_norm=trait("qk_norm"),
        rotated=rotated[: config.num_hidden_layers],
    )


def head_dim(config: Any) -> int:
    """Width of an attention head of a `text_config`."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
