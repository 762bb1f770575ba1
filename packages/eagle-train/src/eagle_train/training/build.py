"""The model of a run, made without values (on the meta device), and the rows that fill it: each rank reads or draws only its shard.

The order is: `empty_model`, which parts are trained, sharding, then `fill_model`. Weights do not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle_train.config import Config, ConfigError
from eagle_train.distributed.world import World
from eagle_train.errors import TrainError

from .model import located, model_config

if TYPE_CHECKING:
    from torch import nn

    from eagle_model.eagle import EagleForConditionalGeneration
    from eagle_model.weights import Rows

ONE_STREAM = 100_000_000
"""Models from random weights with fewer parameters are drawn tensor after tensor from one generator, as transformers draws them; larger
ones block by block (`eagle_model.initial.drawn`), so that every rank draws its shard alone. Part of what run.seed means."""


class WeightsError(TrainError, RuntimeError):
    """The weights that a run starts from can't be read, on at least one rank; raised on every rank with the same message."""

    on_every_rank = True


@dataclass(frozen=True)
class EmptyModel:
    """A model on the meta device, and the rows of its parameters by name; None where a checkpoint of the run follows."""

    model: EagleForConditionalGeneration
    rows: dict[str, Rows] | None


def empty_model(config: Config, tokenizer: Any, *, weights: bool = True) -> EmptyModel:
    """The model of a run in float32 with its adapters and its layers in 4 bits, on the meta device, and where its weights come from:
    run.seed, the checkpoint or the parts. Only headers of files are read.

    weights: False gives no rows, for a model into which a checkpoint of the run is read. Raises ConfigError for adapters that do not
    fit and for 4 bits without bitsandbytes, and ValueError for tensors that are missing or of another shape.
    """
    empty = _unrounded(config, tokenizer, weights=weights)
    _quantize(config, empty.model)
    return empty


def _unrounded(config: Config, tokenizer: Any, *, weights: bool) -> EmptyModel:
    import torch

    described = model_config(config, tokenizer)
    torch.manual_seed(config.run.seed)
    model = on_meta(described)
    if config.model.path is not None or config.model.vision is not None:
        return _pretrained(config, model, len(tokenizer), weights=weights)
    _add_adapters(config, model)
    adapter = _place_adapter(config, model) if weights else {}
    if not weights:
        return EmptyModel(model, None)
    from eagle_model.initial import drawn
    from eagle_model.weights import of_tensor

    if sum(parameter.numel() for parameter in model.parameters()) >= ONE_STREAM:
        return EmptyModel(model, drawn(model, config.run.seed) | adapter)
    whole = type(model)(described).float()
    _add_adapters(config, whole)
    return EmptyModel(model, {name: of_tensor(parameter.detach()) for name, parameter in whole.named_parameters()} | adapter)


def on_meta(described: Any) -> EagleForConditionalGeneration:
    """A model in float32 on the meta device: no memory is taken and no random numbers are drawn."""
    import torch
    from transformers.initialization import no_init_weights

    from eagle_model.eagle import EagleForConditionalGeneration

    with torch.device("meta"), no_init_weights():
        model = EagleForConditionalGeneration(described).float()
    model.tie_weights()
    return model


def _pretrained(config: Config, model: EagleForConditionalGeneration, vocabulary: int, *, weights: bool) -> EmptyModel:
    """The rows of the checkpoint or the parts; a connector that no file holds and new adapters are drawn from torch's generator."""
    from eagle_model.checkpoint import EMBEDDING, HEAD, checkpoint_rows
    from eagle_model.pretrained import grow_vocabulary, parts_rows
    from eagle_model.weights import grown, of_tensor

    rows: dict[str, Rows] = {}
    if weights:
        connector = model.mlp1.to_empty(device="cpu")
        connector.apply(model._init_weights)
        rows = {name: of_tensor(parameter.detach()) for name, parameter in connector.named_parameters(prefix="mlp1")}
        model.mlp1.to(device="meta")
        if config.model.path is not None:
            rows |= checkpoint_rows(model, located(config, "path"))
        else:
            rows |= parts_rows(model, located(config, "vision"), located(config, "language"))
    grow_vocabulary(model, vocabulary)
    for name in (EMBEDDING, HEAD):
        if name in rows and rows[name].shape[0] < vocabulary:
            rows[name] = grown(rows[name], vocabulary)
    _add_adapters(config, model)
    if not weights:
        return EmptyModel(model, None)
    return EmptyModel(model, rows | _new_adapters(model) | _place_adapter(config, model))


def _new_adapters(model: nn.Module) -> dict[str, Rows]:
    """Random matrices of all adapters of a model, drawn whole and in order: they are small."""
    import torch

    from eagle_model.initial import draws
    from eagle_model.lora import adapters
    from eagle_model.weights import of_tensor

    rows = {}
    for name, layer in adapters(model).items():
        for matrix in ("lora_A", "lora_B"):
            tensor = torch.empty(getattr(layer, matrix).shape)
            draws(model.config, layer)[matrix].fill_(tensor)
            rows[f"{name}.{matrix}"] = of_tensor(tensor)
    return rows


def _add_adapters(config: Config, model: EagleForConditionalGeneration) -> None:
    """Adapters on the parts that a stage trains as lora."""
    from eagle_model.lora import add_lora

    for part, lora in config.adapters.items():
        try:
            add_lora(model, part, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        except ValueError as error:
            raise ConfigError(f"model.lora.{part}: {error}") from error


def _quantize(config: Config, model: EagleForConditionalGeneration) -> None:
    """Layers in 4 bits, as `model.quantize` says, without values: `fill` rounds the weights."""
    from eagle_model.lora import quantize

    for part in config.model.quantize:
        try:
            quantize(model, part, empty=True)
        except ImportError as error:
            raise ConfigError(
                f"model.quantize: 4-bit weights need bitsandbytes ({error.__cause__}): pip install 'eagle-train[qlora]'"
            ) from error


def use_fp8(config: Config, model: EagleForConditionalGeneration) -> None:
    """Products of 8-bit floats in the parts of `model.fp8`. Raises ConfigError for layers that can't have them."""
    from eagle_model.lora import use_float8

    for part, recipe in config.model.fp8.items():
        try:
            use_float8(model, part, recipe)
        except ValueError as error:
            raise ConfigError(f"model.fp8.{part}: {error}; leave {part} out of model.fp8") from error


def _place_adapter(config: Config, model: EagleForConditionalGeneration) -> dict[str, Rows]:
    """The rows of `model.adapter`, which must fit the adapters of `model.lora`."""
    from eagle_model.lora import adapters, place_adapter
    from eagle_model.weights import of_tensor

    if config.model.adapter is None:
        return {}
    expected = {name: layer.alpha for name, layer in adapters(model).items()}
    try:
        tensors = place_adapter(model, config.model.adapter)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"model.adapter: {error}") from error
    for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        if expected.get(name) != adapters(model)[name].alpha:
            wanted = f"alpha {adapters(model)[name].alpha:g}" if name in expected else "an adapter there"
            raise ConfigError(f"model.adapter: {name} needs {wanted}; set model.lora to the adapter's rank, alpha and targets")
    return {name: of_tensor(tensor) for name, tensor in tensors.items()}


def allocate(model: nn.Module, device: Any) -> None:
    """Give a model on the meta device, sharded or not, memory on `device`; its values are undefined except those of buffers."""
    from torch import nn

    from eagle_model.weights import fill_buffers

    nn.Module.to_empty(model, device=device)
    model.tie_weights()  # type: ignore[operator]  # each module got a parameter of its own
    fill_buffers(model)


def fill_model(model: nn.Module, rows: dict[str, Rows] | None, world: World) -> None:
    """Memory and weights for a model of `empty_model` that may be sharded by now; every rank calls it.

    rows: None leaves values undefined. Raises WeightsError on every rank when one of them can't read its rows.
    """
    from eagle_model.weights import fill

    allocate(model, world.device)
    failure = None
    if rows is not None:
        try:
            fill(model, rows)
        except Exception as error:
            if world.size == 1:
                raise
            failure = f"{type(error).__name__}: {error}"
    failures = world.failures(failure)
    if failures:
        raise WeightsError(f"the weights that the run starts from can't be read: {'; '.join(failures)}")


def build_model(config: Config, tokenizer: Any, *, weights: bool = True) -> EagleForConditionalGeneration:
    """The whole model on the CPU in float32, with adapters and the weights of `empty_model`.

    weights: False leaves values undefined, for a model into which a checkpoint of the run is read.
    """
    from eagle_model.weights import fill

    empty = empty_model(config, tokenizer, weights=weights)
    allocate(empty.model, "cpu")
    if empty.rows is not None:
        fill(empty.model, empty.rows)
    return empty.model
