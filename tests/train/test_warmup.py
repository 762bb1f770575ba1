"""The step that compiles kernels: it runs for every kind of run, draws nothing, and its failure is not one of the run."""

import logging
import threading

import pytest
import torch

from eagle_train.runs.ready import get_ready
from eagle_train.training import warmup
from eagle_train.training.model import model_config
from eagle_train.training.warmup import Warmup, one_layer_model, step_once


@pytest.fixture
def make(colour_run):
    def described(**changes):
        config = colour_run(**changes)
        config = config.replaced(parallel=config.parallel.replaced(dtype="float32"))
        return config, model_config(config, get_ready(config, held_out=False).tokenizer)

    return described


STAGE = {"max_tokens": 1280, "steps": 1}


@pytest.mark.parametrize("stage", [{}, {"train": ["connector"]}, {"train": ["vision"], "parts": {"language": {"train": "lora"}}}])
def test_a_step_of_one_layer(make, stage):
    config, described = make(stages=[{"name": "one", **STAGE, **stage}])
    layers = described.text_config.num_hidden_layers
    state = torch.get_rng_state()
    model = one_layer_model(config, described, torch.device("cpu"))
    assert [len(model.blocks(part)) for part in ("vision", "language")] == [1, 1]
    step_once(model, described, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert described.text_config.num_hidden_layers == layers > 1


def test_the_step_has_gradients(make):
    config, described = make(stages=[{"name": "one", **STAGE}])
    model = one_layer_model(config, described, torch.device("cpu"))
    step_once(model, described, torch.device("cpu"))
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_no_model_is_made_in_the_thread(make, monkeypatch):
    """transformers switches initialisation off for the whole process meanwhile, and the run's weights may be drawn at that time."""
    config, described = make(stages=[{"name": "one", **STAGE}])
    threads, build, step = [], warmup.on_meta, warmup.step_once
    monkeypatch.setattr(warmup, "on_meta", lambda *arguments: threads.append(threading.current_thread()) or build(*arguments))
    monkeypatch.setattr(warmup, "step_once", lambda *arguments: threads.append(threading.current_thread()) or step(*arguments))
    Warmup(config, described, torch.device("cpu")).wait()
    assert threads[0] is threading.current_thread()
    assert len(threads) == 2
    assert threads[1] is not threads[0]


def test_a_model_that_cannot_be_made_is_left_to_the_run(make, monkeypatch):
    config, described = make(stages=[{"name": "one", **STAGE}])
    monkeypatch.setattr(warmup, "one_layer_model", lambda *_: 1 / 0)
    Warmup(config, described, torch.device("cpu")).wait()


def test_what_fails_is_left_to_the_first_step(make, monkeypatch, caplog):
    config, described = make()

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(warmup, "step_once", fail)
    with caplog.at_level(logging.DEBUG, logger=warmup.__name__):
        Warmup(config, described, torch.device("cpu")).wait()
    assert [record.levelname for record in caplog.records if record.name == warmup.__name__] == ["DEBUG"]
