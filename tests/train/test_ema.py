"""The moving average of the weights: its definition, and that a run which resumes has the same one."""

import shutil

import pytest
import torch

from eagle_model import EagleForConditionalGeneration
from eagle_train.config import ConfigError
from eagle_train.distributed.world import start_world
from eagle_train.runs.export import export
from eagle_train.runs.folder import open_run
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.ema import trained_names
from eagle_train.training.trainer import Trainer


def run(config):
    torch.set_num_threads(1)
    return train(get_ready(config), start_world(config.parallel, "cpu")).trainer


@pytest.fixture
def averaged(colour_run):
    def make(**sections):
        return colour_run(model=colour_run().model.model_dump() | {"ema": 0.75}, **sections)

    return make


def test_it_is_the_average_of_all_steps(averaged, monkeypatch, tmp_path):
    config, seen = averaged(checkpoint={"every": 2}), []
    step = Trainer._step

    def watched(self, *arguments):
        if not seen:
            seen.append({name: parameter.detach().clone() for name, parameter in self.model.named_parameters()})
        result = step(self, *arguments)
        seen.append({name: parameter.detach().clone() for name, parameter in self.model.named_parameters()})
        return result

    monkeypatch.setattr(Trainer, "_step", watched)
    trainer = run(config)
    expected = seen[0]
    for weights in seen[1:]:
        expected = {name: 0.75 * tensor + 0.25 * weights[name] for name, tensor in expected.items()}
    assert len(seen) == 7
    for name, tensor in trainer.average.tensors.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    export(open_run(config.run.folder), tmp_path / "exported", ema=True)
    exported = EagleForConditionalGeneration.from_pretrained(tmp_path / "exported")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, trainer.average.tensors[name]), name

    # Resumed from the middle of the last stage.
    shutil.rmtree(config.run.folder / "checkpoints" / "two-end")
    again = run(config)
    for name, tensor in again.average.tensors.items():
        assert torch.equal(tensor, trainer.average.tensors[name]), name


def test_only_what_is_trained_has_one(averaged):
    stages = [
        {"name": "s", "max_tokens": 640, "steps": 1, "packs_per_step": 1, "train": ["connector"], "parts": {"language": {"train": "lora"}}}
    ]
    trainer = run(averaged(stages=stages))
    assert set(trainer.average.tensors) == trained_names(trainer.model, trainer.config)
    assert {name.partition(".")[0] for name in trainer.average.tensors if "lora" not in name} == {"mlp1"}
    assert {name.partition(".")[0] for name in trainer.average.tensors if "lora" in name} == {"language_model"}


def test_a_run_without_one_is_refused(colour_run, tmp_path):
    config = colour_run()
    run(config)
    with pytest.raises(ConfigError, match=r"has no moving average: model.ema was not set; export without --ema"):
        export(open_run(config.run.folder), tmp_path / "exported", ema=True)
