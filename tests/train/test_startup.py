"""Where the time goes until the first step: phases, their line, and the record of the first step."""

import time

import torch

from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics
from eagle_train.training.startup import BEGAN, StartUp, note_beginning


def test_ranks_count_from_the_command_that_launched_them():
    environment = {}
    note_beginning(environment)
    began = float(environment[BEGAN])
    assert 0 <= time.monotonic() - began < 10
    rank = environment | {"RANK": "1"}
    note_beginning(rank)
    assert float(rank[BEGAN]) == began
    time.sleep(0.02)
    note_beginning(environment)  # a command that another one started counts from its own beginning
    assert float(environment[BEGAN]) > began
    alone = {"RANK": "0"}
    note_beginning(alone)
    assert BEGAN in alone


def test_phases_add_up_to_the_time_since_the_beginning():
    began = time.monotonic() - 5
    startup = StartUp.of_command({BEGAN: str(began)})
    startup.over("launch")
    startup.over("nothing")
    time.sleep(0.1)
    startup.over("model")
    assert list(startup.phases) == ["launch", "nothing", "model"]
    assert 5.1 <= sum(startup.phases.values()) + 0.01 <= time.monotonic() - began + 0.02
    startup.phases = {"launch": 4.04, "nothing": 0.01, "model": 26.0}
    assert startup.line() == "first step after 30.1 s: launch 4.0, model 26.0"


def test_the_first_record_of_a_command_has_them(colour_run):
    torch.set_num_threads(1)
    config = colour_run(run={"log_every": 2})
    startup = StartUp()
    startup.over("facts")
    train(get_ready(config), start_world(config.parallel, "cpu"), startup=startup)
    steps = [record for record in Metrics(config.run.folder / "metrics.jsonl") if record["kind"] == "step"]
    assert list(steps[0]["start"]) == ["facts", "model", "first step"]
    assert len(steps) > 1
    assert not any("start" in record for record in steps[1:])
