"""What each rank of test_parallel.py runs: the runs of some configuration files one after the other, from prepare to the last checkpoint.

train_on_ranks.py VANISHING PORT:CONFIG...: VANISHING is a file beside each configuration that goes away between preparing and training;
each run meets at a port of its own, or a fast rank would join the meeting of the run before.
"""

import os
import sys
from pathlib import Path

import torch

from eagle_train.config import load_config
from eagle_train.training.parallel import start_world
from eagle_train.training.run import get_ready, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[2:]:
        os.environ["MASTER_PORT"], _, name = argument.partition(":")
        path = Path(name)
        config = load_config(path)
        world = start_world(config.parallel, "cpu")
        ready = get_ready(config, world)
        world.barrier()
        if world.is_main:
            (path.parent / sys.argv[1]).unlink()
        world.barrier()
        train(ready, world)
        world.close()
