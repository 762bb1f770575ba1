"""Decode steps that are recorded once and replayed, with a recorder for the CPU: it computes the call again from the same arguments."""

import pytest
import torch
from transformers import CompileConfig

from eagle_model import EagleProcessor, replay
from tests.support.media import random_image


class Recorder:
    """Like a CUDA graph: nothing is computed while recording, and a replay writes new values into the same output."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, call):
        self.recordings += 1
        logits = torch.zeros(0)

        def again():
            self.replays += 1
            new = call().logits
            logits.resize_(new.shape).copy_(new)

        return replay.EagleOutput(logits=logits), again  # type: ignore[arg-type]


@pytest.fixture
def chat(make_model, make_config, small_tokenizer):
    config = make_config(tokenizer=small_tokenizer, text_config={"initializer_range": 0.35, "num_hidden_layers": 3}, max_dynamic_tiles=4)
    return make_model(config, seed=3), EagleProcessor.for_config(small_tokenizer, config)


def compiled():
    config = CompileConfig(backend="cudagraphs")
    config._compile_all_devices = True  # type: ignore[assignment] # what transformers asks before it compiles on a CPU
    return config


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}, {"num_beams": 2}])
def test_replayed_steps_give_the_same_answers(chat, options, monkeypatch):
    model, processor = chat
    inputs = processor(text=["What is it?", "<image-1> is a longer question?"], images=[[], [random_image(1)]])
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False} | options
    expected = model.generate(**inputs, **options)
    recorder = Recorder()
    monkeypatch.setattr(replay.ReplayedSteps.__init__, "__defaults__", (recorder,))
    for _ in range(2):  # each answer has a cache, and a recording, of its own
        assert torch.equal(model.generate(**inputs, cache_implementation="static", compile_config=compiled(), **options), expected)
    if "num_beams" not in options:  # beams are not compiled by every release of transformers
        assert (recorder.recordings, recorder.replays) == (2, 2 * 7)


def test_without_a_device_for_graphs_every_step_runs(chat, caplog, monkeypatch):
    model, processor = chat
    inputs = processor(text="What is it?")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def fails(_):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(replay.ReplayedSteps.__init__, "__defaults__", (fails,))
    answer = model.generate(**inputs, cache_implementation="static", compile_config=compiled(), **options)
    assert torch.equal(answer, model.generate(**inputs, **options))
    assert caplog.text.count("decoding without a CUDA graph: recording it failed with no graphs here") == 1
