"""A long step is reported with what it does; short ones are not."""

import itertools
import json
import re
import time

import torch

from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import heartbeat
from eagle_train.training.heartbeat import Heartbeat
from eagle_train.training.trainer import Trainer
from tests.support.waiting import wait_for


def test_only_what_takes_long_is_reported():
    lines = []
    with Heartbeat(lines.append, every=1.5) as beat:  # so much longer than a step that a loaded machine does not make one slow
        for number in range(20):
            beat.begin(f"step {number}")
            time.sleep(0.1)
        assert lines == []
    with Heartbeat(lines.append, every=0.2) as beat:
        beat.begin("step 20")
        beat.at("forward/backward of pack 3 of 32")
        wait_for(lambda: len(lines) >= 2)
    reported = len(lines)
    assert {re.sub(r"\d+ s", "0 s", line) for line in lines} == {"step 20: 0 s, now in forward/backward of pack 3 of 32"}
    time.sleep(0.5)
    assert len(lines) == reported  # nothing after the end


def test_the_main_rank_names_what_the_others_wait_in():
    store, lines, silent = torch.distributed.HashStore(), [], []
    beats = [Heartbeat(lines.append, 0.2, store=store, rank=0, size=4)]
    beats += [Heartbeat(silent.append, 0.2, store=store, rank=rank, size=4) for rank in (1, 2)]  # rank 3 never starts
    with beats[0], beats[1], beats[2]:
        for beat, place in zip(beats, ("forward/backward of pack 1 of 2", "the sums over all ranks", "the sums over all ranks")):
            beat.begin("step 5")
            beat.at(place)
        wait_for(lambda: lines and "rank 1, 2" in lines[-1])
    duration = r"\d+ s( to \d+ s)?"  # a loaded machine may suspend any of the threads
    assert re.fullmatch(
        rf"step 5: {duration}, now in forward/backward of pack 1 of 2; rank 1, 2: the sums over all ranks for {duration}; "
        r"rank 3: has not reported",
        lines[-1],
    ), lines
    assert silent == []


def test_ranks_in_one_place_are_named_together_with_their_shortest_and_longest_wait():
    store, lines = torch.distributed.HashStore(), []
    for rank, what in ((1, ["step 5", "the sums", 61.0]), (2, ["step 4", "", 70.0]), (3, ["step 5", "the sums", 2.4])):
        store.set(f"doing/{rank}", json.dumps(what))
    with Heartbeat(lines.append, 0.05, store=store, size=5) as beat:
        beat.begin("step 5")
        wait_for(lambda: lines)
    assert re.sub("^step 5: [^;]*", "step 5", lines[0]) == (
        "step 5; rank 1, 3: the sums for 2 s to 1:01; rank 2: step 4, its beginning for 1:10; rank 4: has not reported"
    )


def test_a_store_that_is_gone_leaves_the_own_state():
    class Gone:
        def set(self, *_):
            raise RuntimeError("connection closed")

    lines = []
    with Heartbeat(lines.append, 0.2, store=Gone(), size=2) as beat:
        beat.begin("step 1")
        wait_for(lambda: lines)
    assert re.fullmatch(r"step 1: \d+ s", lines[0])


def test_a_slow_step_of_a_run(colour_run, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(heartbeat, "EVERY", 0.4)
    forward, lines, calls = Trainer._forward_backward, [], itertools.count(1)

    def slow(self, *arguments):
        if next(calls) == 2:
            wait_for(lambda: lines and "pack 2" in lines[-1])
        return forward(self, *arguments)

    monkeypatch.setattr(Trainer, "_forward_backward", slow)
    config = colour_run()
    train(get_ready(config), start_world(config.parallel, "cpu"), on_slow=lines.append)
    assert any(re.fullmatch(r"step 1 of stage one: \d+ s, now in forward/backward of pack 2 of 2", line) for line in lines), lines
