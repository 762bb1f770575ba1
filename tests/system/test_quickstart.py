"""The whole quickstart with less data: built, prepared, planned, trained in three stages, evaluated, exported, and continued."""

import json

import pytest
import torch

from eagle_model.eagle import EagleForConditionalGeneration
from eagle_train.cli.tables import frames_table, plan_table, score_table
from eagle_train.config import ConfigError
from eagle_train.quickstart.build import ON_CPU, ON_GPU, Size
from eagle_train.quickstart.quickstart import FRAMES, Tables, run_quickstart
from eagle_train.runs.folder import remove_run
from eagle_train.training.checkpoint import whole
from eagle_train.training.metrics import Metrics

SIZE = Size(images=40, positions=1, train_clips=6, test_clips=3)
STEPS = (4, 3, 2)


class Recorder:
    """Keeps messages."""

    def __init__(self):
        self.messages = []
        self.steps = 0

    def message(self, text):
        self.messages.append(text)

    def record(self, record):
        self.steps += record["kind"] == "step"

    def preparing(self):
        return self.counting("")

    def counting(self, what):
        from contextlib import nullcontext

        return nullcontext(lambda *numbers: None)


def test_quickstart_in_small(tmp_path):
    torch.set_num_threads(1)
    output = Recorder()
    settings = ON_CPU._replace(steps=STEPS)
    options = {
        "size": SIZE,
        "settings": settings,
        "overrides": ["loader.workers=0", "data.workers=1"],
        "tables": Tables(plan_table, score_table, frames_table),
    }
    result = run_quickstart(tmp_path, output, **options)
    text = "\n".join(output.messages)
    run = tmp_path / "quickstart"
    assert f"Run folder: {run}" in text
    assert "eagle chat" in text
    assert "right with at most" in text
    scores = result.by_source()
    assert set(scores) == {"test_questions", "test_videos"}
    assert scores["test_questions"].questions > 300
    assert 0.4 < scores["test_questions"].text_only < 0.9
    assert not [answer for answer in result.answers if answer.problem]
    assert [path.name for path in whole(run / "checkpoints")] == ["short-end", "middle-end", "long-end"]
    steps = [record for record in Metrics(run / "metrics.jsonl") if record["kind"] == "step"]
    assert sum(record["missing"] for record in steps) == 0
    assert {record["stage"] for record in steps} == {"short", "middle", "long"}
    for name in ("plot.png", "answers.jsonl", "frames/sweep.png", "config.yaml"):
        assert (run / name).is_file(), name
    for name in ("model/config.json", "model/model.safetensors", "model/tokenizer.json"):
        assert (run / name).is_file(), name
    swept = [json.loads(line) for line in (run / "frames" / "sweep.jsonl").read_text().splitlines()]
    assert [(row["frames"], row["source"], row["questions"]) for row in swept] == [
        (most, "test_videos", scores["test_videos"].questions) for most in FRAMES
    ]
    assert EagleForConditionalGeneration.from_pretrained(run / "model").num_parameters() > 100_000

    # The same command again has nothing left to train, and gives the same answers.
    again = run_quickstart(tmp_path, output, **options)
    assert again.answers == result.answers
    assert [record["kind"] for record in Metrics(run / "metrics.jsonl")].count("final") == 1

    # A fresh start removes a run, and nothing else.
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "config.yaml").write_text("mine: 1")
    with pytest.raises(ConfigError, match="precious is not removed: it holds no run"):
        run_quickstart(tmp_path, output, fresh=True, **(options | {"overrides": ["run.name=precious"]}))
    assert (tmp_path / "precious" / "config.yaml").read_text() == "mine: 1"
    remove_run(run)
    assert not run.exists()


@pytest.mark.gpu
def test_quickstart_where_there_is_a_gpu(tmp_path):
    """Which it takes by itself, in float32."""
    output = Recorder()
    result = run_quickstart(tmp_path, output, size=SIZE, settings=ON_GPU._replace(steps=STEPS), overrides=["data.workers=1"])
    assert "on cuda" in "\n".join(output.messages)
    steps = [record for record in Metrics(tmp_path / "quickstart" / "metrics.jsonl") if record["kind"] == "step"]
    assert [record["stage"] for record in steps if record["step"] == record["steps"]] == ["short", "middle", "long"]
    assert not [answer for answer in result.answers if answer.problem]
