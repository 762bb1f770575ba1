"""A run that ends in the middle of a stage and continues is, to the bit, the run that did not, with every optimizer and both precisions of
weights; also where a stage takes over the optimizer's state."""

import pytest
import torch

from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics, same_run


class Ended(BaseException):
    """The process is gone."""


def end_after(steps):
    """An `on_start` that ends the run after so many steps of this process, before a checkpoint of the last one."""

    def start(trainer):
        left = iter(range(steps - 1, -1, -1))

        def after_step():
            if next(left, None) == 0:
                raise Ended

        trainer.after_step = after_step

    return start


#: Optimizer, weights and dtype of the computation.
WAYS = [
    ("adamw", "bfloat16", "bfloat16"),
    pytest.param("adamw", "float32", "bfloat16", marks=pytest.mark.slow),
    pytest.param("adamw8bit", "bfloat16", "bfloat16", marks=pytest.mark.slow),  # compiles
    ("adamw_host", "float32", "float32"),
    pytest.param("muon", "float32", "bfloat16", marks=pytest.mark.slow),
    pytest.param("adafactor", "float32", "float32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("optimizer", "weights", "dtype"), WAYS)
def test_a_run_that_continues(colour_run, monkeypatch, optimizer, weights, dtype):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
    monkeypatch.setenv("WORLD_SIZE", "1")
    torch.set_num_threads(1)
    common = {"max_tokens": 640, "packs_per_step": 2, "lr": 1e-3, "optimizer": optimizer}
    stages = [{"name": "one", "steps": 3, **common}, {"name": "two", "steps": 2, "train": ["connector", "language"], **common}]
    stages[1]["carry_optimizer"] = optimizer != "adafactor"
    outcomes = []
    for name, ends in (("straight", ()), ("continued", (2, 3))):
        model = colour_run().model.model_dump() | {"weights": weights, "ema": 0.9}
        sections = {"model": model, "stages": stages, "parallel": {"dtype": dtype}, "checkpoint": {"every": 1}}
        config = colour_run(run={"name": name}, **sections)
        for steps in (*ends, None):
            world = start_world(config.parallel, "cpu")
            try:
                trainer = train(get_ready(config), world, on_start=end_after(steps) if steps else None).trainer
            except Ended:
                continue
            finally:
                world.close()
        tensors = dict(trainer.model.named_parameters()) | {f"average {key}": one for key, one in trainer.average.tensors.items()}
        local = {key: (one.to_local() if hasattr(one, "to_local") else one).detach().clone() for key, one in tensors.items()}
        outcomes.append((list(same_run(Metrics(config.run.folder / "metrics.jsonl"))), local))
    (records, tensors), (others, continued) = outcomes
    assert records == others
    assert len(records) >= 5
    for name, tensor in tensors.items():
        assert torch.equal(continued[name], tensor), name
