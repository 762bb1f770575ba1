"""lmms-eval finds the plugin and evaluates a local JSON task with images and a video, offline; answers are those of `generate`."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmms_eval")

from eagle_model import EagleForConditionalGeneration, EagleProcessor
from eagle_model.integrations.lmms_eval import Eagle
from eagle_train.errors import EVALUATION_FAILED
from tests.support.media import random_image, random_pixels, write_video
from tests.support.models import save_tiny_model

TASK = """\
task: local_media
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visuals
doc_to_text: !function functions.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata: [{{version: 0}}]
"""
FUNCTIONS = """\
def visuals(doc):
    return [doc["medium"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory, folder):
    """Rows with media; expected answers are those of the model for all but the last."""
    path = tmp_path_factory.mktemp("media")
    random_image(1, (90, 40)).save(path / "a.png")
    random_image(2, (40, 90)).save(path / "b.png")
    write_video(path / "c.mp4", [random_pixels(seed, (64, 48)) for seed in range(20)], fps=10)
    rows = [{"question": f"What is {name}?", "medium": str(path / name)} for name in ("a.png", "b.png", "c.mp4", "b.png")]
    for row in rows:
        row["answer"] = generated(folder, row)
    rows[-1]["answer"] = "something else"
    return rows


def generated(folder, row):
    model, processor = (
        EagleForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(),
        EagleProcessor.from_pretrained(folder),
    )
    kind = "video" if row["medium"].endswith("mp4") else "image"
    messages = [{"role": "user", "content": [{"type": kind, kind: row["medium"]}, {"type": "text", "text": row["question"]}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def write_task(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_media.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "functions.py").write_text(FUNCTIONS)


def scores_of(out):
    [result] = out.rglob("*results.json")
    return json.loads(result.read_text())["results"]["local_media"]["exact_match,none"]


def test_a_local_task(folder, rows, tmp_path):
    """Through lmms-eval's command: three of four answers are the expected ones, and the answers are logged."""
    write_task(tmp_path, rows)
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "eagle",
        "--model_args",
        f"pretrained={folder},device=cpu",
        "--tasks",
        "local_media",
    ]
    command += ["--include_path", str(tmp_path), "--batch_size", "1", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert scores_of(tmp_path / "out") == pytest.approx(0.75)


def test_log_likelihoods(folder, rows):
    """The sum of the log-probabilities of an answer is the model's loss on it; the model's own answer is the greedy one."""
    eagle = Eagle(str(folder), device="cpu")
    eagle.task_dict = {"task": {"test": rows}}
    request = SimpleNamespace(args=(rows[0]["question"], "red", lambda row: [row["medium"]], 0, "task", "test"))
    [(value, greedy)] = eagle.loglikelihood([request])
    messages = [
        {"role": "user", "content": [{"type": "image", "image": rows[0]["medium"]}, {"type": "text", "text": rows[0]["question"]}]},
        {"role": "assistant", "content": "red"},
    ]
    inputs = eagle.answerer.processor(messages=[messages], return_labels=True)
    end = inputs["labels"][0].nonzero().flatten()[inputs["labels"][0].nonzero().flatten() >= 0]
    labels = inputs["labels"].clone()
    last = (labels[0] != -100).nonzero()[-1]
    labels[0, last] = -100  # the end of the answer is not part of the continuation
    assert len(end) > 0
    count = int((labels != -100).sum())
    with torch.no_grad():
        loss = eagle.answerer.model(**{**inputs, "labels": labels}).loss
    assert value == pytest.approx(-loss.item() * count, rel=1e-4)
    assert not greedy


def test_rounds(folder, rows):
    """A task of two rounds gets two answers, the second after the first."""
    eagle = Eagle(str(folder), device="cpu")
    eagle.task_dict = {"task": {"test": rows}}
    seen = []

    def messages(row, round_idx=None, previous_output=None, previous_round_info=None):
        first = [{"role": "user", "content": [{"type": "image", "url": row["medium"]}, {"type": "text", "text": row["question"]}]}]
        if round_idx is None:
            return first
        seen.append((round_idx, list(previous_output), previous_round_info))
        again = [*first, {"role": "assistant", "content": previous_output[0]}, {"role": "user", "content": "Why?"}]
        return (again, round_idx == 2, previous_output, "info")

    request = SimpleNamespace(args=("", messages, {"max_new_tokens": 4}, 0, "task", "test"))
    [answers] = eagle.generate_until_multi_round([request])
    assert answers[0] == rows[0]["answer"]
    assert seen == [(1, answers[:1], None), (2, answers, "info")]


def test_what_is_unknown_is_refused(folder):
    with pytest.raises(ValueError, match="batch_size"):
        Eagle(str(folder), device="cpu", batch_size=8)
    with pytest.raises(ValueError, match="max_token_count"):
        Eagle(str(folder), device="cpu").answerer.answer([{"role": "user", "content": "a"}], {"max_token_count": 3})


def evaluated(folder, tmp_path, *options, tasks="local_media"):
    """`eagle eval FOLDER --lmms`; the finished process."""
    command = [sys.executable, "-m", "eagle_train.cli", "eval", str(folder), "--lmms", tasks, "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    command += ["--include-path", str(tmp_path), "--out", str(tmp_path / "out"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def test_eagle_eval(folder, rows, tmp_path):
    """`eagle eval MODEL --lmms`: the score of all rows, and files that it names."""
    write_task(tmp_path, rows)
    done = evaluated(folder, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert scores_of(tmp_path / "out") == pytest.approx(0.75)
    named = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith(("scores: ", "answers: "))]
    assert len(named) == 2
    assert all(os.path.isfile(path) for path in named)


def test_eagle_eval_fails_with_a_status(folder, rows, tmp_path):
    """lmms-eval ends with status 0 after an error; `eagle eval` does not."""
    write_task(tmp_path, rows)
    done = evaluated(folder, tmp_path, tasks="no_such_task")
    assert done.returncode == EVALUATION_FAILED, done.stdout[-2000:]
    assert "lmms-eval wrote no results" in done.stderr
