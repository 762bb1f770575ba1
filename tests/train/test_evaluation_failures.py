"""An evaluation that fails on one of two ranks or on both: no rank hangs, and training continues where that is possible."""

import sys
from pathlib import Path

import pytest

from eagle_train.config import dump_config
from eagle_train.training.metrics import Metrics, same_run
from tests.support.ranks import outputs_of, start_processes

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
