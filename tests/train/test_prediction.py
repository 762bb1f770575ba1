"""`eagle plan --gpus`: time and memory of every stage, and an error that names the smallest change where it can't fit."""

import json
import re

import numpy as np
import pytest

from eagle_train.config import ConfigError, dump_config
from eagle_train.planning.costs import FP8_SPEEDUP
from eagle_train.planning.gpus import Gpu
from eagle_train.runs.prediction import (
    GIB,
    Rate,
    assumed_rate,
    check_fits,
    measured_rate,
    named_gpu,
    needed_gib,
    predict_stages,
    rate_of,
)
from eagle_train.runs.ready import get_ready
from eagle_train.runs.resources import for_gpus
from eagle_train.training.model import model_config
from eagle_train.training.step_memory import planned


@pytest.fixture
def ready(colour_run):
    return lambda **sections: get_ready(colour_run(**sections), held_out=False)


def needed(ready, gpus, **sections):
    """GiB of a GPU for the run of `ready` with other sections."""
    config = for_gpus(ready.config)
    for name, values in sections.items():
        config = config.replaced(**{name: getattr(config, name).replaced(**values)})
    return needed_gib(planned(config, model_config(config, ready.tokenizer), gpus).gpu / GIB)


def test_times_are_flops_over_rate_of_the_slowest_group(ready):
    run = ready()
    for gpus in (1, 2):
        stages = predict_stages(run, gpus, Rate(1e9, "given"))
        for stage, schedule in zip(stages, run.schedules):
            plan = schedule.plan(0)
            costs = plan.pack_costs().reshape(plan.steps, -1)
            longest = costs.sum(axis=1) if gpus == 1 else costs.max(axis=1)  # two packs a step: together, or one after the other
            assert stage.seconds == pytest.approx(np.mean(longest) / 1e9)
            assert stage.gpu_hours(gpus) == pytest.approx(stage.steps * stage.seconds * gpus / 3600)
            assert stage.after == plan.spread(gpus)
    config = for_gpus(run.config)
    for stage in stages:  # the second one is longer and trains less
        alone = config.replaced(stages=[one for one in config.stages if one.name == stage.name])
        assert stage.gib == planned(alone, model_config(alone, run.tokenizer), 2).gpu / GIB


def test_the_rate_is_that_of_measured_steps(ready):
    run = ready()
    assert measured_rate(run.config) is None
    run.config.run.folder.mkdir(parents=True, exist_ok=True)
    steps = [{"kind": "step", "step": step, "total_step": step, "tflops": rate} for step, rate in ((1, 0.1), (2, 3.0), (3, 5.0))]
    (run.config.run.folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*steps, {"kind": "eval"}]))
    rate = measured_rate(run.config)
    assert rate.flops == pytest.approx(4e12)
    assert "median of 2 measured steps" in rate.source
    assert assumed_rate(named_gpu("h200")).flops == pytest.approx(0.4 * 989.4e12)
    with pytest.raises(ConfigError, match="--gpu T4: not in the table; known are"):
        named_gpu("T4")


def test_eight_bits_shorten_steps_at_the_same_measured_rate(ready):
    """A rate from steps with 8-bit products gives the time of those steps; an assumed rate gives less time than bfloat16 takes."""
    plain = ready()
    fast = ready(model={**plain.config.model.model_dump(), "fp8": {"language": "rowwise"}})
    slow_stages, fast_stages = (predict_stages(run, 1, Rate(1e9, "given")) for run in (plain, fast))
    for slow, quick in zip(slow_stages, fast_stages):
        assert slow.seconds / FP8_SPEEDUP < quick.seconds < slow.seconds
        assert quick.steps == slow.steps
    folder = fast.config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    for stage, schedule in zip(fast_stages, fast.schedules):
        record = {"kind": "step", "step": 2, "total_step": 2, "stage": stage.name, "tflops": 3.0}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        seconds = next(one.seconds for one in predict_stages(fast, 1, rate_of(fast, named_gpu("H200"))) if one.name == stage.name)
        plan = schedule.plan(0)
        assert seconds == pytest.approx(plan.pack_costs().sum() / plan.steps / 3e12)


def test_what_fits_is_accepted_and_what_does_not_names_the_smallest_change(ready):
    run = ready()
    most = needed(run, 2)
    check_fits(run, 2, Gpu("small", 1.0, most + 1e-6, (9, 0)))
    shared = needed(run, 2, parallel={"all_gather": 2})
    assert shared < most
    with pytest.raises(ConfigError, match=r"it does not fit: a step needs .* of each of 2 small") as error:
        check_fits(run, 2, Gpu("small", 1.0, shared + 1e-6, (9, 0)))
    assert "The smallest change that helps: parallel.all_gather: 2 (packs shared by 2 GPUs)" in str(error.value)
    with pytest.raises(ConfigError, match="choose a smaller model"):
        check_fits(run, 2, Gpu("tiny", 1.0, 0.4, (9, 0)))
    keeping = ready(model=run.config.model.model_dump() | {"activations": "keep"})  # needs more than what is modelled
    check_fits(keeping, 2, Gpu("large", 1.0, 80.0, (9, 0)))
    with pytest.raises(ConfigError, match=r"a step needs at least .* of each of 2 tiny"):
        check_fits(keeping, 2, Gpu("tiny", 1.0, 0.4, (9, 0)))


def test_plan_prints_it_and_fails(colour_run, tmp_path, eagle_here, monkeypatch):
    from eagle_train.planning import gpus

    (tmp_path / "run.yaml").write_text(dump_config(colour_run()))
    done = eagle_here("plan", tmp_path / "run.yaml", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    header = r"stage +trained +GiB per GPU +s per step +steps +time +GPU hours +waiting +by tokens"
    assert re.search(header + r"\none +[\d,]+ +0\.0 .*\ntwo +[\d,]+ +0\.0 ", done.stdout)
    assert "at 396 TFLOP/s per GPU (assumed: 40% of the bf16 peak of H100" in done.stdout
    monkeypatch.setattr(gpus, "GPUS", (Gpu("H100", 989.4, 0.4, (9, 0)),))
    failed = eagle_here("plan", tmp_path / "run.yaml", "--gpus", 2)
    assert failed.returncode == 2
    assert "GPU hours" in failed.stdout
    assert "error: it does not fit: a step needs 0.5 GiB of each of 2 H100" in failed.stderr
    document = json.loads(eagle_here("plan", tmp_path / "run.yaml", "--gpus", 2, "--json").stdout)
    assert document["problem"] in failed.stderr
    uneven = eagle_here("plan", tmp_path / "run.yaml", "--gpus", 3)
    assert uneven.returncode == 2
    assert "packs_per_step is 2, which 3 data-parallel groups can't share evenly" in uneven.stderr
