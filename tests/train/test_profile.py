"""`--profile` writes a trace and a table, and says so when there was nothing to profile."""

import gzip
import json
import logging

import torch

from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train


def test_a_trace_of_some_steps(colour_run, caplog):
    torch.set_num_threads(1)
    config = colour_run(stages=[{"name": "one", "max_tokens": 640, "steps": 4, "packs_per_step": 2}])
    with caplog.at_level(logging.INFO, logger="eagle_train"):
        train(get_ready(config), start_world(config.parallel, "cpu"), profile=1)
    folder = config.run.folder / "profile"
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::mm" in names
    # One step of two packs, and not all four of them.
    assert sum(event.get("name") == "aten::embedding" and event.get("ph") == "X" for event in trace["traceEvents"]) == 2
    assert "aten::mm" in (folder / "operators.txt").read_text()
    assert "trace.json.gz" in caplog.text


def test_too_few_steps(colour_run, caplog):
    torch.set_num_threads(1)
    config = colour_run(stages=[{"name": "one", "max_tokens": 640, "steps": 1, "packs_per_step": 2}])
    train(get_ready(config), start_world(config.parallel, "cpu"), profile=1)
    assert "no profile was written: this command made fewer than 3 steps" in caplog.text


def test_the_quickstart_has_none(eagle_here):
    refused = eagle_here("train", "quickstart", "--profile", 2)
    assert refused.returncode == 2
    assert "--profile is for a run of your own" in refused.stderr
