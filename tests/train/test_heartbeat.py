"""A long step is reported with what it does; short ones are not."""

import re
import time

import torch

from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import heartbeat
from eagle_train.training.heartbeat import Heartbeat
from eagle_train.training.trainer import Trainer


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
        time.sleep(0.55)
    reported = len(lines)
    assert reported >= 2
    assert {re.sub(r"\d s", "0 s", line) for line in lines} == {"step 20: 0 s, now in forward/backward of pack 3 of 32"}
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
        time.sleep(0.7)
    expected = "step 5: 0 s, now in forward/backward of pack 1 of 2; rank 1, 2: the sums over all ranks for 0 s; rank 3: has not reported"
    assert lines
    assert set(map(re.sub, [r"\d s"] * len(lines), ["0 s"] * len(lines), lines)) == {expected}
    assert silent == []


def test_a_store_that_is_gone_leaves_the_own_state():
    class Gone:
        def set(self, *_):
            raise RuntimeError("connection closed")

    lines = []
    with Heartbeat(lines.append, 0.2, store=Gone(), size=2) as beat:
        beat.begin("step 1")
        time.sleep(0.35)
    assert lines[0] == "step 1: 0 s"


def test_a_slow_step_of_a_run(colour_run, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(heartbeat, "EVERY", 0.4)
    forward, waited = Trainer._forward_backward, []

    def slow(self, *arguments):
        if not waited or len(waited) == 1:
            waited.append(arguments)
            time.sleep(0.6 * (len(waited) == 2))
        return forward(self, *arguments)

    monkeypatch.setattr(Trainer, "_forward_backward", slow)
    lines = []
    config = colour_run()
    train(get_ready(config), start_world(config.parallel, "cpu"), on_slow=lines.append)
    assert any(re.fullmatch(r"step 1 of stage one: \d s, now in forward/backward of pack 2 of 2", line) for line in lines), lines
