"""Runs with `packing.share_media`: the steps are those of separate samples, and a run that is killed or shared by ranks is the same run."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from eagle_train.config import dump_config
from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics, same_run
from tests.support.ranks import free_ports, outputs_of, start_processes

CHILD = Path(__file__).with_name("train_on_ranks.py")
GONE = "3.png"
QUESTIONS = (
    ("what color?", None),
    ("name it in a long sentence, with all that can be said about it", "it is nothing but "),
    ("why?", "because of "),
)


@pytest.fixture
def many_questions(colour_run, tmp_path, write_jsonl):
    """`make(share_media, **sections)`: the coloured images and the video of `colour_run`, with three questions each."""

    def make(share_media, *, steps=5, packs_per_step=2, weighting="token", **sections):
        stages = [
            {
                "name": "one",
                "max_tokens": 2048,
                "steps": steps,
                "packs_per_step": packs_per_step,
                "lr": 1e-3,
                "eps": 1e-3,
                "loss_weighting": weighting,
            }
        ]
        name = f"{'trees' if share_media else 'separate'}{len(list(tmp_path.glob('*.jsonl')))}"
        config = colour_run(stages=stages, packing={"share_media": share_media}, **{"run": {"name": name}} | sections)
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        many = []
        for row in rows:
            colour = row["conversations"][1]["value"]
            medium = "<image>" if "image" in row else "<video>"
            for question, answer in QUESTIONS:
                turns = [{"from": "human", "value": medium + question}, {"from": "gpt", "value": (answer or "") + colour}]
                many.append({key: row[key] for key in ("image", "video") if key in row} | {"conversations": turns})
        write_jsonl(tmp_path / "rows.jsonl", many)
        return config

    return make


def trained(config, **options):
    torch.set_num_threads(1)
    return train(get_ready(config), start_world(config.parallel, "cpu"), **options).trainer


def steps(config):
    return [record for record in Metrics(config.run.folder / "metrics.jsonl") if record["kind"] == "step"]


@pytest.mark.parametrize("weighting", ["token", "sample", "sqrt"])
def test_an_epoch_as_one_step_is_that_of_separate_samples(many_questions, weighting):
    """All rows in one optimizer step: whichever packs they are in, loss, gradient and the weights after it are the same."""
    whole = {"weighting": weighting}
    models, records = [], []
    for share_media in (False, True):
        probe = many_questions(share_media, steps=1, packs_per_step=1, run={"name": f"probe{share_media}"}, **whole)
        packs = get_ready(probe).schedules[0].plan(0).packs
        config = many_questions(share_media, steps=1, packs_per_step=packs, **whole)
        models.append(trained(config).model.state_dict())
        records += steps(config)
    separate, trees = records
    assert separate["samples"] == trees["samples"] == 75
    assert separate["labels"] == trees["labels"]
    assert trees["tokens"] < 0.7 * separate["tokens"]
    assert trees["tiles"] * 3 == separate["tiles"]
    assert trees["loss"] == pytest.approx(separate["loss"], rel=1e-5)
    assert trees["grad_norm"] == pytest.approx(separate["grad_norm"], rel=1e-4)
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, atol=2e-5, rtol=1e-4, msg=name)


def until_killed(config):
    def stop(record):
        if record["kind"] == "step" and record["total_step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    trained(config, on_record=stop)


def test_killed_and_resumed_is_the_run_that_was_not(many_questions):
    straight, killed = (many_questions(True, run={"name": name, "seed": 5}) for name in ("straight", "killed"))
    expected = trained(straight).model.state_dict()
    process = multiprocessing.get_context("spawn").Process(target=until_killed, args=(killed,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [record["total_step"] for record in steps(killed)][-1] == 4
    resumed = trained(killed).model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    assert same_run(steps(killed)) == same_run(steps(straight))
    assert len(steps(killed)) == 5


def test_two_ranks_that_share_each_pack_train_what_one_trains(many_questions, tmp_path):
    """With an image that is gone when rows are read: the three samples of it are missing, their sisters in the pack stay."""
    alone = many_questions(True, steps=2, checkpoint={"every": 100})
    shared = many_questions(True, steps=2, checkpoint={"every": 100}, parallel={"dtype": "float32", "all_gather": 2})
    path = tmp_path / "ranks.yaml"
    path.write_text(dump_config(shared))
    image = (tmp_path / GONE).read_bytes()
    ports = free_ports(2)
    processes = start_processes([sys.executable, str(CHILD), str(ports[0]), GONE, f"{ports[1]}:{path}"], 2)
    outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    (tmp_path / GONE).write_bytes(image)
    ready = get_ready(alone)
    (tmp_path / GONE).unlink()
    torch.set_num_threads(1)
    train(ready, start_world(alone.parallel, "cpu"))
    missing = 0
    for a, b in zip(steps(alone), steps(shared), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for key in ("tokens", "tiles", "samples", "missing", "labels"):
            assert a[key] == b[key], key
        missing += a["missing"]
    assert missing == 3
