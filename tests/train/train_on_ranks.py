"""What each rank of test_parallel.py runs: the runs of some configuration files one after the other, from prepare to the last checkpoint.

train_on_ranks.py PORT VANISHING PORT:CONFIG...: VANISHING is a file next to each configuration that goes away between preparing and
training; each run meets at a port of its own, or a fast rank would join the meeting of the run before.
"""

import datetime
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from eagle_train.config import ParallelConfig, load_config
from eagle_train.distributed.world import RankError, start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train


def wait_for_the_first():
    """The first rank may take longer than any collective, and when it can't go on no rank does."""
    world = start_world(ParallelConfig(dtype="float32"), "cpu")
    world.barrier()
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=0.5), torch.distributed.group.WORLD)

    def measure():
        time.sleep(1.5)
        return "measured"

    assert world.first(measure) == ("measured" if world.is_main else None)
    with pytest.raises(ValueError if world.is_main else RankError, match="no number"):
        world.first(lambda: int("no number"))
    world.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = sys.argv[1]
    wait_for_the_first()
    for argument in sys.argv[3:]:
        os.environ["MASTER_PORT"], _, name = argument.partition(":")
        path = Path(name)
        config = load_config(path)
        world = start_world(config.parallel, "cpu")
        ready = get_ready(config, world)
        world.barrier()
        if world.is_main:
            (path.parent / sys.argv[2]).unlink()
        world.barrier()
        train(ready, world)
        world.close()
