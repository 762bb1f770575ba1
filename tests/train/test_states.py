"""Optimizer states as they are planned, by kinds of parameters, next to those that every optimizer really makes."""

from importlib.util import find_spec

import pytest
import torch

from eagle_kernels import Training
from eagle_model.lora import add_lora
from eagle_model.memory import decoder_shape, vision_shape
from eagle_train.config import StageConfig
from eagle_train.training.optim import OPTIMIZERS, make_optimizer, set_trainable
from eagle_train.training.states import Kinds, trained_kinds
from tests.support.models import tiny_config, tiny_model

#: Matrices of at least 4096 elements, as adamw8bit keeps in 8 bits.
TEXT = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 64, "intermediate_size": 128}
MODES = (
    {"vision": "full", "connector": "full", "language": "full"},
    {"vision": "frozen", "connector": "full", "language": "lora"},
    {"vision": "lora", "connector": "frozen", "language": "full"},
)


def built(modes, tied=False):
    config = tiny_config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=tied)
    model = tiny_model(config)
    adapted = [part for part, mode in modes.items() if mode == "lora"]
    for part in adapted:
        add_lora(model, part, rank=64, alpha=1.0)
    set_trainable(model, modes)
    training = {part: Training(mode, rank=64 if part in adapted else 0) for part, mode in modes.items()}
    tower = vision_shape(config, 64, training=training["vision"], connector=training["connector"])
    return model, trained_kinds(decoder_shape(config, training["language"]), tower)


def state_bytes(optimizer):
    return sum(
        value.element_size() * value.numel() if not hasattr(value, "codes") else value.codes.nbytes + value.scale.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )


@pytest.mark.parametrize("modes", MODES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_all_trained_parameters_have_a_kind(modes, tied):
    model, kinds = built(modes, tied)
    assert sum(kinds) == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad and parameter.ndim == 1)
    assert kinds.vectors == vectors
    matrices = make_optimizer(model, StageConfig(name="s", max_tokens=64, lr=1e-3, optimizer="muon")).param_groups
    assert kinds.matrices == sum(parameter.numel() for group in matrices if group["matrix"] for parameter in group["params"])


@pytest.mark.parametrize("modes", MODES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_planned_states_are_those_of_the_optimizer(name, modes):
    if name == "adamw8bit" and not find_spec("torchao"):
        pytest.skip("needs torchao")
    model, kinds = built(modes)
    optimizer = make_optimizer(model, StageConfig(name="s", max_tokens=64, lr=1e-3, optimizer=name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    choice = OPTIMIZERS[name]
    planned = choice.states(kinds) + choice.host_bytes * sum(kinds)
    # adafactor: a row and a column of a matrix. adamw8bit: scales of blocks, and matrices that are too small.
    sides = sum(
        4 * (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2])
        for parameter in trained
        if parameter.ndim > 1
    )
    slack = {"adafactor": sides, "adamw8bit": 0.06 * planned}.get(name, 0)
    assert planned <= state_bytes(optimizer) <= planned + slack


def test_kinds_that_differ():
    assert OPTIMIZERS["muon"].states(Kinds(100, 10, 1)) == 4 * 100 + 8 * 11
    assert OPTIMIZERS["muon"].most_bytes == 8
    assert OPTIMIZERS["adamw"].states(Kinds(100, 10, 1)) == 8 * 111
