"""`eagle eval --lmms` without lmms-eval: its command, the model folder of a run, and failures that end with status 0."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from eagle_model import EagleForConditionalGeneration
from eagle_train.config import ConfigError
from eagle_train.distributed.world import start_world
from eagle_train.errors import WRONG_USE, EvaluationError
from eagle_train.runs.export import load_trained
from eagle_train.runs.lmms import lmms_command, model_folder, run_lmms
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.model import load_run_tokenizer


def fake(tmp_path, body):
    """A program in place of lmms-eval that runs `body`."""
    (tmp_path / "fake.py").write_text(body)
    return [sys.executable, str(tmp_path / "fake.py")]


def test_the_command():
    settings, generation = {"device": "cpu", "max_frames": 4}, {"max_new_tokens": None}
    command = lmms_command(Path("/m"), ["a", "b"], Path("/o"), settings=settings, generation=generation, limit=3, include=Path("/t"))
    assert command[:5] == [sys.executable, "-m", "lmms_eval", "--model", "eagle"]
    options = dict(pairwise(command))
    assert options["--tasks"] == "a,b"
    assert options["--model_args"] == "pretrained=/m,device=cpu,max_frames=4"
    assert (options["--limit"], options["--include_path"], options["--output_path"]) == ("3", "/t", "/o")
    assert "--gen_kwargs" not in command
    again = lmms_command(Path("/m"), ["a"], Path("/o"), settings={}, generation={"max_new_tokens": 5})
    assert again[again.index("--gen_kwargs") + 1] == "max_new_tokens=5"
    with pytest.raises(ConfigError, match="comma"):
        lmms_command(Path("/a,b"), ["a"], Path("/o"), settings={}, generation={})


def test_failures(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(EvaluationError, match="wrote no results"):
        run_lmms(fake(tmp_path, ""), out)
    with pytest.raises(EvaluationError, match="ended with status 3"):
        run_lmms(fake(tmp_path, "raise SystemExit(3)"), out)
    body = f"open({str(out / '1_results.json')!r}, 'w').write('{{}}')"
    assert run_lmms(fake(tmp_path, body), out) == [out / "1_results.json"]


def test_a_run_is_exported_for_the_evaluation(colour_run, tmp_path):
    """With the weights of its checkpoint, and removed again, also after an error."""
    stage = {"name": "one", "max_tokens": 640, "steps": 1, "packs_per_step": 1, "lr": 1e-2}
    config = colour_run(rows=6, stages=[stage])
    world = start_world(config.parallel, "cpu")
    train(get_ready(config), world)
    expected = load_trained(config, load_run_tokenizer(config), world)[0].state_dict()
    with model_folder(config.run.folder, tmp_path, dtype="float32") as folder:
        exported = EagleForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert not folder.exists()
    evaluation = model_folder(config.run.folder, tmp_path)
    folder = evaluation.__enter__()
    assert folder.is_dir()
    assert not evaluation.__exit__(RuntimeError, RuntimeError("in the evaluation"), None), "the error was swallowed"
    assert not folder.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"), model_folder(tmp_path / "empty", tmp_path):
        pass


def test_wrong_use(tmp_path, eagle_here, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "eagle_2_5_vl"}))
    for options, words in (
        (["--metric", "anls"], "--metric cannot be given with --lmms"),
        (["--frames", "4,8"], "one number of frames"),
        (["--include-path", "none"], "there is no such folder"),
    ):
        monkeypatch.setattr("eagle_train.runs.lmms.check_lmms", lambda tasks: None)
        done = eagle_here("eval", tmp_path, "--lmms", "a", *options)
        assert done.returncode == WRONG_USE
        assert words in done.stderr
