"""The linear layers of a model by name, for adapters and for weights in 4 bits."""

from typing import Any

from torch import nn


def linear_layers(model: Any, part: str) -> dict[str, nn.Linear]:
    """The linear layers of a part (`vision`, `connector`, `language`) by their names in the model, without the language head."""
    inside, head = set(model.parts()[part].modules()), model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside - {head}}


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the model's layer `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
