"""Sizes by name, from `tiny` (trained on a CPU in minutes) to `8b` (the released model)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from eagle_model.prompt import IM_END, IMG_CONTEXT, TextEncoder

if TYPE_CHECKING:  # the table itself is read without torch, which EagleConfig imports
    from eagle_model.configuration import EagleConfig

_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SIGLIP_448 = _SIGLIP | {"image_size": 448, "patch_size": 14}

#: Keyword arguments of `EagleConfig`, by name.
PRESETS: dict[str, dict[str, Any]] = {
    # 64-pixel tiles of 8x8 patches, 16 tokens each.
    "tiny": {
        "vision_config": {
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
        },
    },
    "1b": {
        "vision_config": _SIGLIP_448,
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
        },
    },
    "2b": {
        "vision_config": _SIGLIP_448,
        "text_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
        },
    },
    "8b": {
        "vision_config": _SIGLIP_448,
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": False,
        },
    },
}


#: Settings of the released models, which differ from the defaults of configuration files.
IN_USE: dict[str, Any] = {
    "select_layer": -1,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_tiles": 1,
    "max_dynamic_tiles": 12,
    "template": "qwen2-chat",
}


def preset(name: str, *, tokenizer: Any = None, **changes: Any) -> EagleConfig:
    """The configuration of that name; `changes` replace keyword arguments of `EagleConfig`, and update its two parts.

    tokenizer: gives the ids of `<IMG_CONTEXT>`, of `<|im_end|>` (which ends every answer, whatever the tokenizer's own end token is) and
    of padding, and the size of the vocabulary where it is larger than the preset's (for `tiny`: always). Raises ValueError for an unknown
    name or change, PromptError when the tokenizer lacks Eagle's tokens.
    """
    from eagle_model.configuration import EagleConfig

    if name not in PRESETS:
        raise ValueError(f"{name!r} is not a preset; presets are {', '.join(PRESETS)}")
    values = IN_USE | changes
    for part in ("vision_config", "text_config"):
        values[part] = deepcopy(PRESETS[name][part]) | changes.get(part, {})
    if tokenizer is not None:
        encoder = TextEncoder(tokenizer)
        values["image_token_index"] = encoder.token_id(IMG_CONTEXT)
        size = len(tokenizer) if name == "tiny" else max(len(tokenizer), values["text_config"]["vocab_size"])
        ids = {"vocab_size": size, "eos_token_id": encoder.token_id(IM_END), "pad_token_id": tokenizer.pad_token_id}
        values["text_config"] = values["text_config"] | ids | changes.get("text_config", {})
    values.setdefault("force_image_size", values["vision_config"]["image_size"])
    config = EagleConfig(**values)
    check_changes(config, changes)
    return config


def check_changes(config: EagleConfig, changes: Mapping[str, Any]) -> None:
    """Raise ValueError for changes that are not a field of a configuration or of its parts; transformers' classes accept any name.

    Older spellings of a field (`rope_theta`) are refused too: the newer one would override them.
    """
    parts = {"": (config, changes)}
    parts |= {f"{part}.": (getattr(config, part), changes[part]) for part in ("vision_config", "text_config") if part in changes}
    for prefix, (owner, given) in parts.items():
        known = {field.name for field in fields(owner)} | set(owner.attribute_map)
        if prefix == "text_config.":
            known.add("head_dim")  # every family reads it, also those whose class does not list it
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise ValueError(f"the configuration has no field {prefix}{name}{f'; did you mean {near[0]}?' if near else ''}")
