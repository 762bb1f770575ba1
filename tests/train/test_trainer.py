"""The loop: it learns, resumes bit for bit after kill -9, stops at a loss that isn't finite, and counts what is missing."""

import gc
import json
import multiprocessing
import os
import signal
import time
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from eagle_train.config import ConfigError
from eagle_train.data.ledger import Ledger
from eagle_train.distributed.world import alone, start_world
from eagle_train.errors import EvaluationError
from eagle_train.runs.folder import claim_folder, open_run
from eagle_train.runs.lock import locked
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import Trained, train
from eagle_train.training import checkpoint
from eagle_train.training.metrics import Metrics, same_run
from eagle_train.training.trainer import Trainer, TrainingError
from tests.support.packs import make_pack


def run(config, **options):
    torch.set_num_threads(1)
    world = start_world(config.parallel, "cpu")
    ready = get_ready(config)
    return train(ready, world, **options).trainer


def numbers(config):
    return same_run(Metrics(config.run.folder / "metrics.jsonl"))


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def train_until_killed(config):
    def stop(record):
        if record["kind"] == "step" and record["total_step"] == 4:
            deadline = time.monotonic() + 60  # the checkpoint of step 3 is written in the background
            while checkpoint.latest(config.run.folder / "checkpoints") is None and time.monotonic() < deadline:
                time.sleep(0.01)
            # In the middle of a step, and with the writer of a later checkpoint already begun.
            os.makedirs(config.run.folder / "checkpoints" / ".writing-one-00000009", exist_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)

    run(config, on_record=stop)


def test_killed_and_resumed_is_the_run_that_was_not(colour_run):
    straight = colour_run(run={"name": "straight", "seed": 3})
    expected = run(straight)
    killed = colour_run(run={"name": "killed", "seed": 3})
    process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(killed,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.latest(killed.run.folder / "checkpoints").name in ("one-00000003", "one-end")
    resumed = run(killed)
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert numbers(killed) == numbers(straight)
    assert len(numbers(killed)) == 6
    assert not list((killed.run.folder / "checkpoints").glob(".writing-*"))
    # Nothing is left to do: training again changes nothing.
    assert torch.equal(weights(run(killed))["mlp1.1.weight"], weights(expected)["mlp1.1.weight"])
    assert numbers(killed) == numbers(straight)


class Stopped(BaseException):
    """Something ends the run."""


def run_until(config, total_step):
    """A run that ends after a step's record is there, and before its checkpoint is."""

    def stop(record):
        if record["total_step"] == total_step:
            raise Stopped

    with pytest.raises(Stopped):
        run(config, on_record=stop)


def test_data_that_changed_is_no_resume(colour_run, tmp_path):
    config = colour_run()
    run_until(config, 4)
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text("".join(rows.splitlines(keepends=True)[:20]))
    with pytest.raises(ConfigError, match=r"one-00000003: was trained on other data \(source rows\)"):
        run(config)
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe = tmp_path / "recipe.yaml"
    for repeat, differing in ((1, ()), (2, (r"source rows",))):  # a recipe file's numbers aren't in config.yaml
        recipe.write_text(f"rows: {{annotation: rows.jsonl, repeat_time: {repeat}}}")
        by_recipe = colour_run(run={"name": "by-recipe"}, data={"recipe": "recipe.yaml", "workers": 1})
        if differing:
            with pytest.raises(ConfigError, match=r"other data \(source rows\)"):
                run(by_recipe)
        else:
            run_until(by_recipe, 4)
    # A checkpoint of a version that didn't write this down is taken as it is.
    state = checkpoint.latest(by_recipe.run.folder / "checkpoints") / "state.json"
    state.write_text(json.dumps({key: value for key, value in json.loads(state.read_text()).items() if key != "data"}))
    run(by_recipe)


def test_one_trainer_per_folder(colour_run):
    config = colour_run()
    unfinished = config.run.folder / "checkpoints" / ".writing-one-00000003"
    with locked(config.run.folder):
        unfinished.mkdir(parents=True)
        with pytest.raises(ConfigError, match=rf"run is being trained by process {os.getpid()} on .*another run.name"):
            run(config)
        assert unfinished.exists()
    run(config)


@pytest.mark.parametrize(("every", "lost_at"), [(None, 4), (3, 3), (None, 6)])
def test_an_evaluation_that_was_interrupted_is_made_up_for(colour_run, every, lost_at):
    def trainer(name, on_evaluate):
        config = colour_run(run={"name": name}, eval={"every": every})
        ready = get_ready(config)
        world = start_world(config.parallel, "cpu")
        return Trainer(config, ready.schedules, ready.tokenizer, world, on_evaluate=on_evaluate)

    def score(model, stage):
        return {"sum": float(sum(parameter.detach().double().sum() for parameter in model.parameters())), "learning": model.training}

    def interrupted(model, stage):
        if trainers[-1].records.metrics and max(record["total_step"] for record in trainers[-1].records.metrics) == lost_at:
            raise Stopped
        return score(model, stage)

    trainers = [trainer("straight", score), trainer("stopped", interrupted)]
    trainers[0].train()
    with pytest.raises(Stopped):
        trainers[1].train()
    again = trainer("stopped", score)
    again.train()
    assert same_run(again.records.metrics) == same_run(trainers[0].records.metrics)


def test_it_learns_and_frozen_parts_stay(colour_run):
    config = colour_run(
        stages=[{"name": "only", "max_tokens": 1280, "steps": 12, "packs_per_step": 1, "lr": 1e-2, "train": ["connector", "language"]}]
    )
    untrained = Trainer(config, get_ready(config).schedules, get_ready(config).tokenizer, start_world(config.parallel, "cpu"))
    before = weights(untrained)
    trainer = run(config)
    losses = [record["loss"] for record in numbers(config)]
    assert losses[-1] < 0.75 * losses[0]
    changed = {name.split(".")[0] for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert changed == {"mlp1", "language_model"}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(colour_run):
    config = colour_run(checkpoint={"every": 1})
    ready = get_ready(config)
    trainer = Trainer(config, ready.schedules, ready.tokenizer, start_world(config.parallel, "cpu"))
    with torch.no_grad():
        trainer.model.mlp1[1].weight[0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"stage one step 1: loss nan.*rows:\d+"):
        trainer.train()
    assert checkpoint.latest(config.run.folder / "checkpoints") is None


def test_a_sample_that_vanished_is_counted_and_the_rest_is_trained(colour_run, tmp_path):
    config = colour_run()
    ready = get_ready(config)
    (tmp_path / "4.png").unlink()
    train(ready, start_world(config.parallel, "cpu"))
    assert sum(record["missing"] for record in numbers(config)) > 0
    entries = [json.loads(line) for line in (config.run.folder / "ledger-train.jsonl").read_text().splitlines()]
    assert {(entry["source"], entry["line"], entry["reason"]) for entry in entries} == {("rows", 5, "unreadable")}


def test_a_resumed_run_counts_what_is_missing_once(colour_run, tmp_path):
    """The sum is right too when not every step is logged."""
    ledgers = []
    for name, log_every in (("straight", 1), ("stopped", 100)):
        data = {"sources": {"rows": {"annotation": "rows.jsonl"}}, "workers": 1, "facts": "facts"}
        config = colour_run(run={"name": name, "log_every": log_every}, data=data)
        get_ready(config)
        for index in range(8):
            (tmp_path / f"{index}.png").unlink()
        if name == "stopped":
            run_until(config, 4)  # from step 3 on it comes again
        run(config)
        ledgers.append(list(Ledger(config.run.folder / "ledger-train.jsonl")))
        assert numbers(config)[-1]["seen_missing"] == len(ledgers[-1])
    assert ledgers[0] == ledgers[1]
    assert {entry.step for entry in ledgers[0]} >= {3, 4, 5}


def test_loss_does_not_depend_on_how_samples_are_packed(colour_run):
    """One pack a step of everything, and the same samples in many packs of a step: the same first loss and gradient norm."""
    first = []
    for name, tokens, packs in (("wide", 4096, 1), ("narrow", 800, 6)):
        stage = {"name": "s", "max_tokens": tokens, "steps": 1, "packs_per_step": packs, "lr": 1e-3, "loss_weighting": "sqrt"}
        config = colour_run(rows=16, run={"name": name}, stages=[stage])
        run(config)
        [record] = numbers(config)
        first.append(record)
    assert first[0]["samples"] == first[1]["samples"] == 17
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)


def test_another_configuration_does_not_continue_a_run(colour_run):
    config = colour_run()
    run(config)
    other = colour_run(sampling={"fps": 1.0})
    with pytest.raises(ValueError, match=r"other settings \(sampling.fps\)"):
        claim_folder(other)
    claim_folder(colour_run(loader={"workers": 1}, run={"name": "run", "log_every": 7}))
    assert open_run(config.run.folder).stages == config.stages


STAGES = [
    {"name": "one", "max_tokens": 640, "steps": 3, "packs_per_step": 1, "lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
    {"name": "two", "max_tokens": 640, "steps": 2, "packs_per_step": 1, "lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
]


def longer(number, steps, **changes):
    return [stage | ({"steps": steps, **changes} if place == number else {}) for place, stage in enumerate(STAGES)]


def test_a_stage_that_is_not_complete_can_be_lengthened(colour_run):
    """At a constant rate, the run is then the one that was long from the start."""
    straight = run(colour_run(run={"name": "straight"}, stages=longer(1, 4)))
    config = colour_run(stages=STAGES, checkpoint={"every": 1})
    run_until(config, 5)  # after one step of the second stage
    resumed = run(colour_run(stages=longer(1, 4), checkpoint={"every": 1}))
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        (longer(0, 9), r"stages\.one\.steps"),  # complete
        (longer(1, 1), r"stages\.two\.steps"),  # fewer
        (longer(1, 4, lr=2e-3), r"stages\.two\.lr"),
        ([STAGES[0], STAGES[1] | {"parts": {"vision": {"lr": 1e-4}}}], r"stages\.two\.parts\.vision"),
    ],
)
def test_other_settings_of_stages_are_refused_by_name(colour_run, stages, names):
    config = colour_run(stages=STAGES, checkpoint={"every": 1})
    run_until(config, 5)
    with pytest.raises(
        ConfigError, match=rf"other settings \({names}\).*eagle export .*run FOLDER.*model.path: FOLDER.*may change.*eval, loader"
    ):
        run(colour_run(stages=stages, checkpoint={"every": 1}))


def test_a_complete_run_is_not_lengthened(colour_run):
    config = colour_run(stages=STAGES)
    run(config)
    with pytest.raises(ConfigError, match=r"other settings \(stages.two.steps\)"):
        run(colour_run(stages=longer(1, 4)))
    # Logging, evaluation, checkpoints and reading may change.
    run(colour_run(stages=STAGES, checkpoint={"every": 1}, eval={"limit": 3}, loader={"prefetch": 1000}, run={"log_every": 3}))


def test_workers_do_not_change_the_numbers(colour_run):
    for name, workers in (("none", 0), ("one", 1)):
        run(colour_run(run={"name": name}, loader={"workers": workers}))
    assert numbers(colour_run(run={"name": "none"})) == numbers(colour_run(run={"name": "one"}))


def test_deterministic_is_torchs_setting_while_it_trains(colour_run):
    seen = []
    usual, config = colour_run(run={"name": "usual"}), colour_run(run={"name": "same", "deterministic": True})
    run(usual)
    run(config, on_record=lambda record: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert numbers(config) == numbers(usual)  # a CPU adds in one order anyway
    claim_folder(colour_run(run={"name": "same"}))  # and a run may go on without it


def test_progress_says_how_much_is_left(colour_run):
    records = []
    begin = time.monotonic()
    run(colour_run(), on_record=records.append)
    steps = [record for record in records if record["kind"] == "step"]
    assert steps[-1]["eta"] == 0
    assert all(0 <= record["eta"] < 60 * (1 + time.monotonic() - begin) for record in steps)


@pytest.mark.parametrize("everything", [False, True])
def test_an_evaluation_that_fails_does_not_end_the_run(colour_run, everything):
    def score(model, step):
        return {"learning": model.training}

    def fails(model, step):
        if everything or step == 4:
            raise TypeError("forward has no argument cache")
        return score(model, step)

    trainers = []
    for name, on_evaluate in (("good", score), ("bad", fails)):
        config = colour_run(run={"name": name})
        ready = get_ready(config)
        trainers.append(Trainer(config, ready.schedules, ready.tokenizer, start_world(config.parallel, "cpu"), on_evaluate=on_evaluate))
        trainers[-1].train()
    good, bad = ([record for record in trainer.records.metrics if record["kind"] == "step"] for trainer in trainers)
    assert same_run(good) == same_run(bad)
    failed = [record for record in trainers[1].records.metrics if record["kind"] == "eval_failed"]
    assert [(record["stage"], record["total_step"]) for record in failed] == [("one", 4), ("two", 6)][: 1 + everything]
    assert "TypeError: forward has no argument cache (test_trainer.py:" in failed[0]["error"]
    assert len(trainers[1].evaluations.failed) == len(failed)
    with pytest.raises(EvaluationError, match=r"training is complete, but \d of its evaluations failed:\n  the evaluation of stage one"):
        Trained(trainers[1], None).check_evaluations()
    Trained(trainers[0], None).check_evaluations()
    # The same command again finds everything trained, and does not repeat what failed.
    assert Trainer(config, ready.schedules, ready.tokenizer, start_world(config.parallel, "cpu"), on_evaluate=score).train() is None
    assert sum(record["kind"] == "eval_failed" for record in trainers[1].records.metrics) == len(failed)


def test_packs_that_the_groups_of_ranks_cannot_share(colour_run):
    """Two groups and a step of one pack: an error before the model is made, not a step without packs."""
    config = colour_run()
    config = config.replaced(stages=[stage.replaced(packs_per_step=1) for stage in config.stages])
    with pytest.raises(
        ConfigError, match=r"packs_per_step is 1, which 2 data-parallel groups can't share evenly; set it to 2, or train on"
    ):
        train(get_ready(config), replace(alone("cpu"), data=2))


def test_a_stage_after_an_evaluation_trains_every_parameter(colour_run):
    """The forward pass of an evaluation leaves FSDP2's whole copies as the model's parameters, which no optimizer may be given."""
    config = colour_run(stages=STAGES, parallel={"dtype": "bfloat16"})
    ready = get_ready(config, held_out=False)
    seen = []

    def evaluate(model, _):
        seen.append({name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()})
        with torch.no_grad():
            model(make_pack(torch.arange(20)))
        return {}

    world = start_world(config.parallel, "cpu")
    try:
        trainer = Trainer(config, ready.schedules, ready.tokenizer, world, on_evaluate=evaluate)
        trainer.train()
        trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    finally:
        world.close()
    assert len(seen) == len(STAGES)
    for before, after in pairwise(seen):
        assert {name for name in before if not torch.equal(before[name], after[name])} == trained


def test_the_model_of_the_stage_before_is_gone_when_the_next_is_made(colour_run, monkeypatch):
    """FSDP2's modules refer to each other in circles, and memory of a GPU that they hold makes Python collect nothing."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    torch.set_num_threads(1)
    common = {"max_tokens": 640, "steps": 1, "packs_per_step": 2, "lr": 1e-3}
    stages = [{"name": "one", "train": ["connector"], **common}, {"name": "two", **common}]
    made, alive, new = [], [], Trainer._new_model

    def watched(trainer, *given, **options):
        alive.append([one() is not None for one in made])
        model = new(trainer, *given, **options)
        made.append(weakref.ref(model.language_model.model.layers[0].mlp))
        return model

    monkeypatch.setattr(Trainer, "_new_model", watched)
    config = colour_run(stages=stages, parallel={"dtype": "bfloat16"}, checkpoint={"every": 1})
    world, ready = start_world(config.parallel, "cpu"), get_ready(config)
    gc.disable()
    try:
        train(ready, world)
    finally:
        gc.enable()
        world.close()
    assert alive == [[], [False]]
