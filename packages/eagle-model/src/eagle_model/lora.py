"""LoRA: low-rank adapters on linear layers (arXiv 2106.09685), read and written in PEFT's file format, and merged into the weights.

A layer with an adapter keeps the name of its weight, so that the weights of a model have the same names with and without adapters.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from eagle_kernels.ops.float8 import MULTIPLE
from eagle_model.checkpoint import save_tensors
from eagle_model.configuration import EagleConfig
from eagle_model.float8 import Float8Linear, Recipe
from eagle_model.layers import linear_layers, replace_layer
from eagle_model.quantized import QuantizedLinear, dequantize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: Settings of PEFT that change what an adapter computes, and the values that this file implements.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "lora_bias": (None, False),
}


class LoraLinear(nn.Linear):
    """`W x + b + alpha / rank * B A x`. lora_A: [rank, in], Kaiming-uniform; lora_B: [out, rank], zero at the start."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.rank, self.alpha = rank, alpha

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x: [..., in] -> [..., out]."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    def merged(self) -> nn.Linear:
        """A plain layer with `W + alpha / rank * B A`, added in float32."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with torch.no_grad():
            weight = self.weight.float() + self.lora_B.float() @ self.lora_A.float() * self.scale
        layer.weight = nn.Parameter(weight.to(self.weight), requires_grad=self.weight.requires_grad)
        layer.bias = self.bias
        return layer


class QuantizedLoraLinear(LoraLinear, QuantizedLinear):
    """A layer with an adapter whose own weight is in 4 bits and frozen (QLoRA, arXiv 2305.14314)."""

    def __init__(self, base: LoraLinear, *, empty: bool = False) -> None:
        QuantizedLinear.__init__(self, base, empty=empty)
        self.lora_A, self.lora_B = base.lora_A, base.lora_B
        self.rank, self.alpha = base.rank, base.alpha


def quantize(model: Any, part: str, *, empty: bool = False) -> list[str]:
    """Round the weights of a part's linear layers to 4 bits; returns the layers' names. Adapters stay; the language head stays as it is.

    empty: the values of the layers are loaded later. Call it after `add_lora` and before the model is sharded. Raises ImportError, with
    the command that installs it, without bitsandbytes.
    """
    layers = linear_layers(model, part)
    for name, layer in layers.items():
        made = QuantizedLoraLinear(layer, empty=empty) if isinstance(layer, LoraLinear) else QuantizedLinear(layer, empty=empty)
        replace_layer(model, name, made)
    return list(layers)


class Float8LoraLinear(LoraLinear, Float8Linear):
    """A layer with an adapter whose own weight is multiplied in 8-bit floats; the adapter's matrices are not."""

    def __init__(self, base: LoraLinear, recipe: Recipe) -> None:
        Float8Linear.__init__(self, base, recipe)
        self.lora_A, self.lora_B = base.lora_A, base.lora_B
        self.rank, self.alpha = base.rank, base.alpha


def use_float8(model: Any, part: str, recipe: Recipe = "rowwise") -> list[str]:
    """Multiply in 8-bit floats in the linear layers of a part, except the language head; returns the layers' names.

    Weights and adapters keep names and values. Call it after `add_lora` and before the model is sharded. Raises ValueError, naming the
    layer, for a size that is not a multiple of 16 and for weights in 4 bits; nothing is changed then.
    """
    layers = linear_layers(model, part)
    for name, layer in layers.items():
        if isinstance(layer, QuantizedLinear):
            raise ValueError(f"{name} has weights in 4 bits, which are multiplied as they are; use one of the two")
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            sizes = f"{layer.in_features} inputs and {layer.out_features} outputs"
            raise ValueError(f"{name} has {sizes}; products of 8-bit floats need multiples of {MULTIPLE}")
    for name, layer in layers.items():
        made = Float8LoraLinear(layer, recipe) if isinstance(layer, LoraLinear) else Float8Linear(layer, recipe)
        replace_layer(model, name, made)
    return list(layers)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def add_lora(model: Any, part: str, *, rank: int, alpha: float, targets: Sequence[str] | None = None) -> list[str]:
    """Give linear layers of a part (`vision`, `connector`, `language`) adapters; returns the layers' names.

    targets: last names of layers (`q_proj`) or ends of their names (`mlp.gate_proj`); default: all linear layers of the part except the
    language head, which is computed together with its loss and takes none. Call it before the model is sharded. Raises ValueError for a
    target without a layer, and for layers that are not plain linears.
    """
    layers = linear_layers(model, part)
    if targets is None:
        chosen = list(layers)
    else:
        for target in targets:
            if not any(_matches(name, target) for name in layers):
                known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
                raise ValueError(f"lora target {target!r} is the name of no linear layer of {part}; it has {known}")
        chosen = [name for name in layers if any(_matches(name, target) for target in targets)]
    for name in chosen:
        if type(layers[name]) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layers[name]).__name__}; an adapter goes on a plain linear layer")
        replace_layer(model, name, LoraLinear(layers[name], rank, alpha))
    return chosen


def _matches(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merge_lora(model: nn.Module) -> list[str]:
    """Add every adapter to its weight and remove it; returns the layers' names. Call it on a model that is not sharded."""
    found = adapters(model)
    for name, layer in found.items():
        replace_layer(model, name, layer.merged())
    return list(found)


def remove_lora(model: nn.Module) -> list[str]:
    """Remove every adapter without adding it to its weight; returns the layers' names."""
    found = adapters(model)
    for layer in found.values():
        nn.init.zeros_(layer.lora_B)
    return merge_lora(model)


def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None) -> None:
    """Write the adapters of a model that is not sharded as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    base: the model that the adapters belong to, a folder or hub name. Raises ValueError for a model without adapters.
    """
    found = adapters(model)
    if not found:
        raise ValueError("the model has no adapters; train a part as lora first")
    first = next(iter(found.values()))
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {name: layer.rank for name, layer in found.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in found.items() if layer.alpha != first.alpha},
        "target_modules": sorted(found),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{name}.{matrix}.weight": getattr(layer, matrix).detach().cpu().contiguous()
        for name, layer in found.items()
        for matrix in ("lora_A", "lora_B")
    }
    save_tensors(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def load_adapter(model: Any, folder: str | Path) -> list[str]:
    """Read an adapter in PEFT's format into a model: layers without an adapter get one; returns the layers' names.

    Raises FileNotFoundError without the two files, and ValueError, naming it, for a setting that is not implemented (DoRA, biases, saved
    modules), a layer that the model does not have, and an adapter of another rank than the one that is there.
    """
    tensors = place_adapter(model, folder)
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))


def place_adapter(model: Any, folder: str | Path) -> dict[str, Tensor]:
    """The matrices of an adapter in PEFT's format, by the names of the model's parameters that they belong to.

    Layers without an adapter get one, and every layer its alpha; the model may be on the meta device, and its values stay. Raises as
    `load_adapter` does.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; name the folder of an adapter in PEFT's format")
    settings = json.loads((folder / CONFIG).read_text())
    for key, values in _NEUTRAL.items():
        if settings.get(key) not in values:
            raise ValueError(f"{folder / CONFIG}: {key} is {settings[key]!r}, which is not supported; merge the adapter with PEFT first")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name, _, matrix = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(_PREFIX) or matrix not in ("lora_A", "lora_B"):
            raise ValueError(
                f"{folder / WEIGHTS}: {key} is not a matrix of an adapter on a linear layer; merge the adapter with PEFT first"
            )
        pairs.setdefault(name, {})[matrix] = tensor
    layers = {name: layer for part in model.parts() for name, layer in linear_layers(model, part).items()}
    for name, pair in pairs.items():
        if name not in layers or set(pair) != {"lora_A", "lora_B"}:
            reason = "the model has no such linear layer" if name not in layers else f"it has {', '.join(pair)} alone"
            raise ValueError(f"{folder / WEIGHTS}: adapter of {name}: {reason}")
        _place(model, name, layers[name], pair, _alpha(settings, name, pair["lora_A"].shape[0]))
    return {f"{name}.{matrix}": tensor for name, pair in pairs.items() for matrix, tensor in pair.items()}


def _alpha(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """Alpha of a layer such that alpha / rank is its scale, also where PEFT divides by the root of the rank."""
    patterns = {key: value for key, value in (settings.get("alpha_pattern") or {}).items() if _matches(name, key)}
    alpha = float(next(iter(patterns.values()), settings.get("lora_alpha", 8)))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _place(model: nn.Module, name: str, layer: nn.Linear, pair: Mapping[str, Tensor], alpha: float) -> None:
    rank = pair["lora_A"].shape[0]
    if not isinstance(layer, LoraLinear):
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"adapter of {name}: the layer is a {type(layer).__name__}; load the adapter before weights are rounded to 4 bits"
            )
        layer = LoraLinear(layer, rank, alpha)
        replace_layer(model, name, layer)
    for matrix, tensor in pair.items():
        own = getattr(layer, matrix)
        if own.shape != tensor.shape:
            raise ValueError(
                f"adapter of {name}: {matrix} is {tuple(tensor.shape)}, and the model's is {tuple(own.shape)}; "
                "its rank must be that of the adapter"
            )
    layer.alpha = alpha


@torch.no_grad()
def merge_checked(model: Any, *, tokens: int = 64) -> float:
    """Merge the adapters, give layers in 4 bits plain weights, and return the largest change of a logit relative to the largest logit.

    Measured on one black tile and `tokens` pseudorandom tokens, on the model's device. In float32 it is about 1e-6.
    """
    config: EagleConfig = model.config
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.text_config.vocab_size, (1, tokens), generator=generator)
    ids[ids == config.image_token_index] = 0 if config.image_token_index else 1
    ids = torch.cat([ids.new_full((1, config.tokens_per_tile), config.image_token_index or 0), ids], 1).to(device)
    side = config.tile_size
    tiles = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
    before = model(ids, pixel_values=tiles, logits_to_keep=tokens).logits.float()
    merge_lora(model)
    dequantize(model)
    after = model(ids, pixel_values=tiles, logits_to_keep=tokens).logits.float()
    return ((after - before).abs().max() / before.abs().max()).item()
