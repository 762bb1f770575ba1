"""An evaluation that fails on one of two ranks or on both: no rank hangs, and training continues where that is possible."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from eagle_train.config import dump_config
from eagle_train.distributed.world import start_world
from eagle_train.errors import EvaluationError
from eagle_train.training.evaluations import Evaluations
from eagle_train.training.metrics import Metrics, same_run
from eagle_train.training.records import Records
from tests.support.ranks import outputs_of, run_on_ranks, start_processes

CHILD = Path(__file__).with_name("evaluate_on_ranks.py")
SECTIONS = {
    "data": {"sources": {"rows": {"annotation": "rows.jsonl"}}, "eval_sources": {"held": {"annotation": "rows.jsonl"}}, "workers": 1},
    "eval": {"limit": 6, "batch_size": 2, "max_new_tokens": 2},
    "stages": [{"name": name, "max_tokens": 640, "steps": 1, "packs_per_step": 2, "lr": 1e-3} for name in ("one", "two")],
}


def run(config, way):
    path = config.run.dir.parent / f"{config.run.name}.yaml"
    path.write_text(dump_config(config))
    processes = start_processes([sys.executable, str(CHILD), str(path), way], 2)
    outputs = outputs_of(processes)
    return [process.returncode for process in processes], outputs, list(Metrics(config.run.folder / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("way", "error"),
    [
        ("reading", "rank 1: OSError: the disk is gone (evaluate_on_ranks.py:"),
        ("everywhere", "rank 0: TypeError: forward has no argument cache (evaluate_on_ranks.py:"),
    ],
)
def test_training_continues_on_every_rank(colour_run, way, error):
    config = colour_run(**SECTIONS)
    codes, outputs, records = run(config, way)
    assert codes == [1, 1], outputs
    assert [(record["kind"], record["stage"]) for record in records] == [
        *(("step", "one"), ("eval_failed", "one"), ("step", "two"), ("eval_failed", "two"), ("eval_failed", "final"))
    ]
    assert error in records[1]["error"]
    for output in outputs:
        assert "training is complete, but 3 of its evaluations failed" in output
        assert error in output
    good = colour_run(**SECTIONS | {"data": {"sources": {"rows": {"annotation": "rows.jsonl"}}, "workers": 1}}, run={"name": "good"})
    path = good.run.dir.parent / "good.yaml"
    path.write_text(dump_config(good))
    steps = [record for record in records if record["kind"] == "step"]
    for record, other in zip(same_run(steps), run(good, "none")[2]):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_a_failure_inside_a_collective_ends_the_run_and_says_so(colour_run):
    config = colour_run(**SECTIONS)
    codes, outputs, records = run(config, "collective")
    assert codes[1] == 1
    assert codes[0] != 0
    assert "rank 1 failed while the others waited for it in a collective: OSError: the disk is gone" in outputs[1]
    assert "the same command continues from the newest checkpoint" in outputs[1]
    assert {(record["kind"], record["stage"]) for record in records} == {("step", "one"), ("eval_failed", "one")}
    assert "rank 1 failed" in records[1]["error"]


class Silent(Records):
    """Records in a list."""

    def __init__(self):
        self.written = []

    def write(self, record):
        self.written.append(record)


def attempts(config):
    """What each rank has of evaluations of which the main rank's part fails, and of one that succeeds after them."""
    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    world, records, model = start_world(config.parallel, "cpu"), Silent(), nn.Linear(1, 1)
    evaluations = Evaluations(config, world, records, 6, None)

    def fail(error):
        raise error

    errors = [OSError("the rows are gone"), EvaluationError("the judge does not answer")]
    results = [evaluations.attempt(model, "one", 3, lambda error=error: world.first(lambda: fail(error))) for error in errors]
    results.append(evaluations.attempt(model, "one", 4, lambda: world.sum(torch.ones(())).item()))
    return results, evaluations.failed, [record["error"] for record in records.written]


def test_what_only_the_main_rank_does_may_fail(colour_run):
    """The judge, or the text-only baseline: training continues on all ranks, as it does on one."""
    main, other = run_on_ranks(2, attempts, colour_run())
    assert main[0] == other[0] == [None, None, 2.0]
    for failed in (main[1], other[1]):
        assert len(failed) == 2
        assert "the evaluation of stage one after step 3 failed: rank 0: OSError: the rows are gone" in failed[0]
        assert "the judge does not answer" in failed[1]
    assert len(main[2]) == 2
    assert other[2] == []
