"""Trained parameters by kind, from sizes alone: optimizers keep different states for matrices, embeddings and vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from eagle_kernels import DecoderShape, VisionShape


class Kinds(NamedTuple):
    """Trained parameters. matrices: weights of linear layers, and adapters; embeddings: the embedding of tokens, the language head, the
    tower's patches and positions; vectors: norms and biases."""

    matrices: int = 0
    embeddings: int = 0
    vectors: int = 0

    def plus(self, other: Kinds) -> Kinds:
        return Kinds(*(one + two for one, two in zip(self, other, strict=True)))


def trained_kinds(decoder: DecoderShape, tower: VisionShape) -> Kinds:
    """Of the whole model, not divided over ranks, by how the shapes say that its parts are trained."""
    bridge = _products(tower.connector_linears(decoder.hidden)), tower.connector_parameters(decoder.hidden)
    of_tower = Kinds(embeddings=tower.width * (tower.patch_values + tower.positions), vectors=3 * tower.width)
    embeddings = decoder.vocab * decoder.hidden * (1 if decoder.tied else 2)
    return (
        _part(decoder, Kinds(embeddings=embeddings, vectors=decoder.hidden))
        .plus(_part(tower, of_tower))
        .plus(_kinds(tower.connector.mode, *bridge, tower.connector_total(decoder.hidden).trained))
    )


def _part(part: DecoderShape | VisionShape, rest: Kinds) -> Kinds:
    """Layers, and the rest of a part, which only a part that is trained in full trains."""
    layers = _kinds(part.training.mode, part.layers * _products(part.linears), part.layers * part.layer_parameters, part.total.trained)
    return layers.plus(rest) if part.training.mode == "full" else layers


def _kinds(mode: str, matrices: int, parameters: int, trained: int) -> Kinds:
    """parameters: of the module, `matrices` of them in linear layers. trained: adapters included."""
    return Kinds(matrices, 0, parameters - matrices) if mode == "full" else Kinds(trained)


def _products(linears: Mapping[str, tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in linears.values())
