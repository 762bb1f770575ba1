"""What each rank of test_evaluation_failures.py runs: evaluate_on_ranks.py CONFIG WAY, where WAY names what fails on which rank.

reading: rank 1 can't read its questions. everywhere: a layer of the model raises on every rank. collective: rank 1 raises while the other
ranks wait for it in a layer.
"""

import datetime
import gc
import sys

import torch
import torch.distributed as dist

from eagle_train.config import load_config
from eagle_train.distributed import world as world_module
from eagle_train.distributed.world import RankError, start_world
from eagle_train.evaluation import evaluate
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train


def break_model(model):
    def fail(module, inputs):
        if not torch.is_grad_enabled():
            raise TypeError("forward has no argument cache")

    model.language_model.model.layers[1].register_forward_pre_hook(fail)


def break_reading(*_):
    raise OSError("the disk is gone")


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, way = load_config(sys.argv[1]), sys.argv[2]
    world = start_world(config.parallel, "cpu")
    ready = get_ready(config, world)
    world_module.FAILED_PATIENCE = datetime.timedelta(seconds=3)
    if way == "reading" and world.rank == 1:
        evaluate._Reader.read = break_reading
    if way == "collective" and world.rank == 1:
        evaluate._answer = break_reading
    try:
        trained = train(ready, world, on_start=lambda trainer: break_model(trainer.model) if way == "everywhere" else None)
    except RankError:
        # What the exiting interpreter does in an order that varies: the group is freed while its thread waits for the other rank.
        dist.destroy_process_group(world.patient)
        world.patient = None
        gc.collect()
        raise
    try:
        trained.final_evaluation()
        print(trained.trainer.evaluations.failed)
        trained.check_evaluations()
    finally:  # as the command does: threads of groups that are still there when the interpreter is gone can end the process with SIGABRT
        dist.destroy_process_group()
