"""Random weights: from which distribution every parameter is drawn, and a way to draw any rows of it alone.

Two orders of drawing. `EagleForConditionalGeneration(config)` draws one tensor after the other from torch's generator, as transformers
does. `drawn` gives every block of rows of every parameter a generator of its own, seeded by (seed, name, number of the block): any rank
draws its shard alone, and the values do not depend on how many ranks there are, on threads, or on the order.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from eagle_model.language.attention import Norm
from eagle_model.lora import LoraLinear
from eagle_model.weights import Rows

DRAWN_ELEMENTS = 1 << 20
"""Elements of the blocks that have generators of their own. Part of the definition: another number gives other weights."""
_TRUNCATED = 0.87962566103423978
"""Standard deviation of a normal distribution that is cut off at two standard deviations."""


@dataclass(frozen=True)
class Draw:
    """normal: standard deviation `scale`; truncated: the same, cut off at -2 and 2; uniform: in [-scale, scale]; constant: `scale`."""

    kind: Literal["normal", "truncated", "uniform", "constant"]
    scale: float

    def fill_(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        """Draw a whole tensor, from torch's own generator by default."""
        if self.kind == "normal":
            init.normal_(tensor, std=self.scale, generator=generator)
        elif self.kind == "truncated":
            init.trunc_normal_(tensor, std=self.scale, generator=generator)
        elif self.kind == "uniform":
            init.uniform_(tensor, -self.scale, self.scale, generator=generator)
        else:
            init.constant_(tensor, self.scale)


def draws(config: Any, module: nn.Module) -> dict[str, Draw]:
    """Distributions of a module's parameters, by their names in the module; config: EagleConfig.

    SigLIP's own scheme for the tower (Xavier, LeCun), normal with `initializer_range` for the rest, ones for norms, zeros for biases.
    """
    result: dict[str, Draw] = {}
    if isinstance(module, SiglipVisionEmbeddings):
        result["position_embedding.weight"] = Draw("normal", config.vision_config.hidden_size**-0.5)
    elif isinstance(module, nn.Conv2d):
        own, inputs = config.patch_initializer_range, module.weight[0].numel()
        result["weight"] = Draw("truncated", math.sqrt(1.0 / inputs) / _TRUNCATED) if own is None else Draw("normal", own)
    elif getattr(module, "xavier", False):
        outputs, inputs = module.weight.shape  # type: ignore[union-attr, misc]
        result["weight"] = Draw("uniform", math.sqrt(3.0) * math.sqrt(2.0 / float(inputs + outputs)))
    elif isinstance(module, nn.Linear | nn.Embedding):
        own = config.initializer_range
        result["weight"] = Draw("normal", config.text_config.initializer_range if own is None else own)
    elif isinstance(module, nn.LayerNorm | Norm):
        result["weight"] = Draw("constant", 1.0)
    if isinstance(module, LoraLinear):
        result |= {"lora_A": Draw("uniform", 1 / math.sqrt(module.in_features)), "lora_B": Draw("constant", 0.0)}
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        result["bias"] = Draw("constant", 0.0)
    return result


def drawn(model: Any, seed: int) -> dict[str, Rows]:
    """Random weights of all parameters of a model, which may be on the meta device; drawn row by row when they are asked for."""
    found: dict[str, Draw] = {}
    for prefix, module in reversed(list(model.named_modules())):  # a module may overrule its children, as SigLIP's embeddings do
        found |= {f"{prefix}.{name}" if prefix else name: draw for name, draw in draws(model.config, module).items()}
    return _rows({name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, found, seed)


def _rows(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Draw], seed: int) -> dict[str, Rows]:
    return {name: Rows(shape, partial(draw_rows, found[name], shape, seed, name), _drawn_rows(shape)) for name, shape in shapes.items()}


def _drawn_rows(shape: tuple[int, ...]) -> int:
    """Rows of the blocks that have generators of their own."""
    return max(1, DRAWN_ELEMENTS // max(1, torch.Size(shape[1:]).numel()))


def draw_rows(draw: Draw, shape: tuple[int, ...], seed: int, name: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a parameter of `shape`, in float32."""
    result = torch.empty(stop - start, *shape[1:])
    step = _drawn_rows(shape)
    for number in range(start // step, -(-stop // step)):
        first, last = number * step, min((number + 1) * step, shape[0])
        digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        low, high = max(first, start), min(last, stop)
        wanted = result[low - start : high - start]
        if (low, high) == (first, last):
            draw.fill_(wanted, generator)
        else:
            block = torch.empty(last - first, *shape[1:])
            draw.fill_(block, generator)
            wanted.copy_(block[low - first : high - first])
    return result
