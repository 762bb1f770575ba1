"""Activation checkpointing: what backward finds of the activations of the model's layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eagle_kernels import Kept, OffloadEngine, offload_checkpoint
from eagle_model.modules import EaglePreTrainedModel

#: Modes of activation checkpointing.
MODES = ("keep", "recompute", "selective", "offload")


def set_mode(
    model: EaglePreTrainedModel,
    mode: str,
    engine: OffloadEngine | None,
    kept: Kept | None,
    vision_kept: Kept | None,
    vision_group: int | None,
    mlp_rows: int | None,
) -> None:
    """As `EagleForConditionalGeneration.set_activation_checkpointing`, which describes the modes."""
    if mode not in MODES:
        raise ValueError(f"activation checkpointing mode {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
    dropout = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
    again = mode in ("selective", "offload")
    if dropout and again:
        raise ValueError(
            f"activation checkpointing mode {mode!r} does not restore the random state that dropout needs; set the dropout of the "
            "adapters to 0 or use 'recompute'"
        )
    model.vision_group = vision_group if again else None
    tower, layers = _tower_layers(model), _decoder_layers(model)
    for layer in layers:
        layer.mlp.rows = mlp_rows if again else None  # type: ignore[union-attr, assignment]
    whole = partial(checkpoint, use_reentrant=False, preserve_rng_state=True) if dropout and mode == "recompute" else None
    run_through(model, whole, partial(offload_checkpoint, engine=engine) if mode == "offload" else whole)
    in_pieces = Kept() if not dropout else None
    if mode == "selective" or (mode == "offload" and vision_group is not None):
        _keep(tower, Kept.all(len(tower)) if vision_kept is None else vision_kept)
    else:
        _keep(tower, None if mode == "keep" else in_pieces)
    if mode == "selective":
        _keep(layers, Kept.all(len(layers)) if kept is None else kept)
    else:
        _keep(layers, in_pieces if mode == "recompute" else None)
    model.gradient_checkpointing = mode != "keep"


def set_layers(model: EaglePreTrainedModel, enable: bool, function: Callable[..., Any], every: int) -> None:
    """Every `every`-th layer, and the others as they are, through a function with the signature of torch's `checkpoint`."""
    recompute = partial(function, use_reentrant=False) if enable else None
    model.vision_group = None
    for layers in (_tower_layers(model), _decoder_layers(model)):
        _keep(layers, None)
    run_through(model, recompute, recompute, every)


def run_through(
    model: EaglePreTrainedModel, vision: Callable[..., Tensor] | None, decoder: Callable[..., Tensor] | None, every: int = 1
) -> None:
    """Let the layers of the vision tower and of the decoder (every `every`-th) run through these functions."""
    tower = model.vision_model.vision_model
    tower.checkpoint, tower.checkpoint_every = vision, every
    for index, layer in enumerate(_decoder_layers(model)):
        layer.checkpoint = decoder if index % every == 0 else None  # type: ignore[assignment]
    model.gradient_checkpointing = vision is not None or decoder is not None


def _tower_layers(model: EaglePreTrainedModel) -> list[nn.Module]:
    """The layers of the vision tower that run."""
    tower = model.vision_model.vision_model
    return list(tower.encoder.layers[: tower.depth])


def _decoder_layers(model: EaglePreTrainedModel) -> list[nn.Module]:
    return list(model.language_model.model.layers)


def _keep(layers: list[nn.Module], kept: Kept | None) -> None:
    for index, layer in enumerate(layers):
        layer.kept = None if kept is None else kept.level(index, len(layers))  # type: ignore[assignment]
