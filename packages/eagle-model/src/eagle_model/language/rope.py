"""Inverse frequencies of rotary position embeddings, computed once in float32 from a text configuration."""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle_model.language.spec import head_dim

#: Scalings whose frequencies do not depend on the length of the sequence.
STATIC_SCALINGS = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2] in float32, and the factor by which rotated queries and keys are scaled (YaRN; 1 otherwise).

    Raises ValueError for a scaling whose frequencies change with the length (`dynamic`, `longrope`) or an unknown one.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in STATIC_SCALINGS:
        raise ValueError(f"text_config.rope_parameters has rope_type {kind!r}; supported are {', '.join(STATIC_SCALINGS)}")
    share = rope.get("partial_rotary_factor")
    if share not in (None, 1.0):
        raise ValueError(f"text_config.rope_parameters has partial_rotary_factor {share}; only heads that are rotated whole are supported")
    # On the host also when the model is built on the meta device, which has no values.
    with torch.device("cpu"):
        if kind == "default":
            width = head_dim(config)
            exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
            return 1.0 / rope["rope_theta"] ** exponents, 1.0
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.float(), float(factor)
