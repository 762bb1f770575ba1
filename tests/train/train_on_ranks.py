"""What each rank of test_parallel.py runs: the run of a configuration file, from prepare to its last checkpoint.

train_on_ranks.py CONFIG [FILE ...]: files that vanish between preparing and training
"""

import sys
from pathlib import Path

import torch

from eagle_train.config import load_config
from eagle_train.training.parallel import start_world
from eagle_train.training.run import get_ready, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    config = load_config(sys.argv[1])
    world = start_world(config.parallel, "cpu")
    ready = get_ready(config, world)
    world.barrier()
    if world.is_main:
        for file in sys.argv[2:]:
            Path(file).unlink()
    world.barrier()
    train(ready, world)
    world.close()
