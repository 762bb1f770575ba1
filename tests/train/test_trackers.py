"""Records of a run as other programs see them; each program is optional."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_train.config import ConfigError, dump_config, parse_config
from eagle_train.config.load import free_keys
from eagle_train.distributed.world import start_world
from eagle_train.evaluation.metrics import Answer
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics
from eagle_train.watching.pictures import SamplePictures, sheet
from eagle_train.watching.trackers import TRACKERS, Trackers, open_trackers, scalars

STEP = {"kind": "step", "stage": "s", "step": 2, "steps": 4, "total_step": 6, "loss": 1.5, "lr": 1e-3}
EVAL = {"kind": "eval", "stage": "s", "total_step": 6, "accuracy": 0.5, "scores": {"a": {"questions": 4, "accuracy": 0.5}}}
ANSWERS = [Answer("a", 1, "what | color?", "red", "A red\none."), Answer("a", 2, "how many?", "two", "three")]
RED = np.full((20, 30, 3), (200, 10, 30), np.uint8)


def test_numbers_of_a_record():
    assert scalars(STEP) == {"train/loss": 1.5, "train/lr": 1e-3}
    assert scalars(EVAL) == {"eval/accuracy": 0.5, "eval/scores/a/questions": 4.0, "eval/scores/a/accuracy": 0.5}


def test_entries_are_names_or_have_options():
    config = parse_config({"trackers": ["tensorboard", {"wandb": {"project": "p", "mode": "offline"}}]})
    assert [(entry.name, entry.options) for entry in config.trackers] == [
        ("tensorboard", {}),
        ("wandb", {"project": "p", "mode": "offline"}),
    ]
    import yaml

    assert parse_config(yaml.safe_load(dump_config(config))) == config
    with pytest.raises(ConfigError, match=r"trackers.0.name: .*tensorboard"):
        parse_config({"trackers": ["aim"]})
    assert "trackers" in set(free_keys())


def test_a_tracker_that_fails_does_not_end_the_run(caplog):
    class Broken:
        calls = 0

        def log(self, step, scalars, answers):
            self.calls += 1
            raise OSError("no space")

        def close(self):
            raise AssertionError

    class Works(Broken):
        def log(self, step, scalars, answers):
            self.calls += 1

        def close(self):
            self.closed = True

    broken, works = Broken(), Works()
    trackers = Trackers({"broken": broken, "works": works})
    with caplog.at_level(logging.ERROR):
        trackers.record(STEP)
        trackers.record(STEP)
        trackers.close()
    assert (broken.calls, works.calls, works.closed) == (1, 2, True)
    assert caplog.text.count("tracker broken failed (OSError: no space) and is not used again") == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named(name, monkeypatch, tmp_path):
    import sys

    for module in (TRACKERS[name][1], "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    config = parse_config({"trackers": [name]}, base=tmp_path)
    with pytest.raises(ConfigError, match=rf"trackers: {name} needs the package .*: pip install {name}"), open_trackers(config):
        pass
    with open_trackers(config, main=False):  # other ranks have none
        pass


def run(tmp_path, *entries):
    config = parse_config({"run": {"name": "r", "dir": "."}, "trackers": list(entries)}, base=tmp_path)
    with open_trackers(config) as trackers:
        trackers.record(STEP)
        trackers.answers(ANSWERS, lambda answer: RED if answer.line == 1 else None)
        trackers.record(EVAL)
    return config.run.folder


@pytest.mark.integration
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run(tmp_path, "tensorboard") / "tensorboard"))
    events.Reload()
    [loss] = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (6, 1.5)
    assert events.Scalars("eval/scores/a/accuracy")[0].value == 0.5
    text = events.Tensors("eval/answers/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| what \\| color? | red | A red one. |" in text
    assert events.Tags()["images"] == ["eval/pictures/01"]
    [picture] = events.Images("eval/pictures/01")
    assert (picture.step, picture.width, picture.height) == (6, 30, 20)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))), RED)


@pytest.mark.integration
def test_wandb_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):  # a run that continues has the same id
        folder = run(tmp_path, {"wandb": {"project": "p", "mode": "offline"}})
    files = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.stem.removeprefix("run-") for file in files} == {(folder / "wandb-run-id.txt").read_text().strip()}
    assert b"train/loss" in files[0].read_bytes()
    media = folder / "wandb" / files[0].parent.name / "files" / "media"
    table = json.loads(next((media / "table").rglob("*.json")).read_text())
    assert table["columns"] == ["question", "expected", "given"]
    assert table["data"] == [["what | color?", "red", "A red\none."], ["how many?", "two", "three"]]
    assert np.array_equal(np.asarray(Image.open(next((media / "images").rglob("*.png"))).convert("RGB")), RED)
    assert "failed" not in caplog.text


@pytest.mark.integration
def test_mlflow(tmp_path, caplog):
    mlflow = pytest.importorskip("mlflow")
    store = f"file:{tmp_path / 'store'}"
    monkey = pytest.MonkeyPatch()
    monkey.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = run(tmp_path, {"mlflow": {"tracking_uri": store}})
    found = mlflow.MlflowClient(store).get_run((folder / "mlflow-run-id.txt").read_text().strip())
    [picture] = (tmp_path / "store").rglob("artifacts/answers-00000006/01.png")
    assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), RED)
    [texts] = (tmp_path / "store").rglob("artifacts/answers-00000006.json")
    assert json.loads(texts.read_text())["given"] == ["A red\none.", "three"]
    monkey.undo()
    assert found.data.metrics["train/loss"] == 1.5
    assert "failed" not in caplog.text


@pytest.mark.integration
def test_trackio(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    run(tmp_path, "trackio")
    assert "failed" not in caplog.text
    [picture] = (tmp_path / "trackio").rglob("*.png")
    assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), RED)


def test_a_run_reports_what_its_metrics_file_holds(colour_run, tmp_path):
    """Every record of metrics.jsonl reaches the trackers, and answers and pictures come with their evaluation."""
    seen, pictures = [], []

    class Collect:
        def log(self, step, scalars, answers):
            seen.append((step, scalars, [answer.expected for answer in answers]))
            pictures.extend(answer.picture for answer in answers)

        def close(self):
            seen.append("closed")

    held_out = {"held": {"annotation": str(tmp_path / "rows.jsonl")}}
    config = colour_run(data={"sources": {"rows": {"annotation": "rows.jsonl"}}, "eval_sources": held_out, "workers": 1}, eval={"limit": 3})
    trackers = Trackers({"collect": Collect()})
    torch.set_num_threads(1)
    ready = get_ready(config)
    sheets = SamplePictures(ready)
    train(
        ready,
        start_world(config.parallel, "cpu"),
        on_record=trackers.record,
        on_answers=lambda answers: trackers.answers(answers, sheets),
    )
    trackers.close()
    records = list(Metrics(config.run.folder / "metrics.jsonl"))
    assert seen.pop() == "closed"
    assert [step for step, *_ in seen] == [record["total_step"] for record in records]
    assert [answers for _, numbers, answers in seen if "eval/accuracy" in numbers] == [["red", "green", "blue"]] * 2
    assert json.loads(json.dumps(seen))
    # Images of 64 x 32 pixels are two tiles and a thumbnail, those of 32 x 32 one tile.
    assert [picture.shape for picture in pictures[:3]] == [(32, 3 * 32 + 4, 3), (32, 32, 3), (32, 3 * 32 + 4, 3)]
    assert [tuple(picture[5, 5]) for picture in pictures[:3]] == [(255, 0, 0), (0, 160, 0), (0, 0, 255)]
    [video] = [row for row in range(len(ready.eval_facts)) if ready.eval_facts.column("line")[row] == 25]
    assert sheets(Answer("held", 25, "what?", "noise", "")).shape[1] > 32
    (tmp_path / "0.png").unlink()
    assert sheets(Answer("held", 1, "what color?", "red", "")) is None
    assert video == 24


def test_tiles_on_a_sheet():
    tiles = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.full((1, 224, 224, 3), 40, np.uint8)
    page = sheet(tiles)
    assert page.shape == (2 * 112 + 2, 4 * 112 + 3 * 2, 3)
    assert [int(page[60, 60 + 114 * column, 0]) for column in range(4)] == [0, 40, 80, 120]
    assert [int(page[60 + 114, 60 + 114 * column, 0]) for column in range(4)] == [160, 200, 255, 255]
