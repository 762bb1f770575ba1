"""lmms-eval loads the task that `eagle needle build` writes: videos, questions and answers are those of the rows."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.tasks import TaskManager, get_task_dict

from eagle_train.evaluation.needle import Settings, build


def test_the_task_has_the_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "needles"
    build(folder, Settings(kinds=("still",), lengths=(4.0,), depths=(0.5,), count=1, side=32))
    monkeypatch.chdir(folder)
    task = get_task_dict(["needle"], TaskManager(include_path=str(folder / "lmms_eval"), include_defaults=False))["needle"]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    documents = list(task.test_docs())
    assert len(documents) == len(rows) == 4
    for document, row in zip(documents, rows):
        [video] = task.doc_to_visual(document)
        assert Path(video) == folder / row["video"]
        assert Path(video).is_file()
        question, answer = (turn["value"] for turn in row["conversations"])
        assert task.doc_to_text(document) == question.removeprefix("<video>")
        assert task.doc_to_target(document) == answer
