"""Evaluations by number of frames and by context length: what the model sees grows as stated, and rows, table and plots agree."""

import json

import numpy as np
import pytest
from PIL import Image

from eagle_model.visual import VisualSpec
from eagle_train.cli.tables import sweep_table
from eagle_train.distributed.world import start_world
from eagle_train.evaluation.metrics import Answer, Evaluation
from eagle_train.runs.evaluate import Evaluator, with_frames
from eagle_train.runs.ready import get_ready
from eagle_train.runs.sweep import Point, sweep, write_points
from eagle_train.training.build import build_model
from eagle_train.watching.accuracy import plot_depths, plot_sweep


def test_frames_limit_the_spec_and_lower_its_minimum():
    spec = VisualSpec(min_frames=8, max_frames=64)
    assert with_frames(spec, None) == spec
    assert (with_frames(spec, 4).min_frames, with_frames(spec, 4).max_frames) == (4, 4)
    assert (with_frames(spec, 128).min_frames, with_frames(spec, 128).max_frames) == (8, 128)


def test_the_model_sees_the_frames_that_a_point_states(colour_run, tmp_path, write_jsonl, write_video):
    """A video of 4 s, 8 frames at 2 fps, in a context that holds up to 7 of them."""
    write_video(tmp_path / "four.mp4", frames=40)
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "noise"}]
    write_jsonl(tmp_path / "videos.jsonl", [{"video": "four.mp4", "conversations": turns}])
    data = {
        "sources": {"rows": {"annotation": "rows.jsonl"}},
        "eval_sources": {"videos": {"annotation": "videos.jsonl"}},
        "workers": 1,
    }
    config = colour_run(data=data, sampling={"min_frames": 1}, eval={"max_new_tokens": 1, "metrics": {"videos": "teacher_forced"}})
    world, ready = start_world(config.parallel, "cpu"), get_ready(config)
    model = build_model(config, ready.tokenizer)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0].tiles)))
    evaluator = Evaluator(ready, world)
    points = sweep(
        lambda frames, length: evaluator.evaluate(model, 0, frames=frames, max_tokens=length), frames=[1, 2, 4, 16], lengths=[300, 4096]
    )
    assert [(point.frames, point.max_tokens) for point in points] == [(n, length) for length in (300, 4096) for n in (1, 2, 4, 16)]
    assert seen[4:] == [1, 2, 4, 8]
    assert seen[:3] == [1, 2, 4]
    assert 4 <= seen[3] < 8, "the context is full"
    rows = [row for point in points for row in point.rows()]
    assert [row["frames"] for row in rows] == [1, 2, 4, 16] * 2
    assert len({row["loss"] for row in rows}) > 2
    answers, table = write_points(points, tmp_path / "out")
    assert [json.loads(line) for line in table.read_text().splitlines()] == rows
    assert [json.loads(line)["max_tokens"] for line in answers.read_text().splitlines()] == [300] * 4 + [4096] * 4
    lines = sweep_table(rows).splitlines()
    assert len(lines) == 9
    assert lines[1].split()[:5] == ["videos", "1", "300", "1", "0"]
    with Image.open(plot_sweep(rows, tmp_path / "sweep.png")) as image:
        assert image.width > image.height, "a panel for every context length"

    # Without a text-only baseline, as of an exported model, there is no value, and no line at 0.
    plain = [row for point in points for row in point._replace(baseline=False).rows()]
    assert [row | {"text_only": 0.0} for row in plain] == [row | {"text_only": 0.0} for row in rows]
    assert {line.split()[-2] for line in sweep_table(plain).splitlines()[1:]} == {"-"}
    zeros = plot_sweep([row | {"text_only": 0.0} for row in rows], tmp_path / "zeros.png").read_bytes()
    assert plot_sweep(plain, tmp_path / "plain.png").read_bytes() != zeros


def scored(source, line, right):
    return Answer(source, line, "?", "yes", "yes" if right else "no")


def test_plots_show_what_was_measured(tmp_path):
    needles = {1: {"kind": "still", "depth": 0.0}, 2: {"kind": "still", "depth": 1.0}, 3: {"kind": "motion", "depth": 0.5}}
    points = []
    for frames in (1, 4):
        answers = tuple(scored("needle", line, right=frames == 4 and line != 2) for line in needles)
        points.append(Point(frames, None, Evaluation(answers, 1.0)))
    answers = [json.loads(line) for line in write_points(points, tmp_path)[0].read_text().splitlines()]
    one = np.asarray(Image.open(plot_depths(answers, needles, tmp_path / "depths.png")).convert("RGB"))
    flipped = [answer | {"score": 1 - answer["score"]} for answer in answers]
    other = np.asarray(Image.open(plot_depths(flipped, needles, tmp_path / "flipped.png")).convert("RGB"))
    assert one.shape == other.shape
    assert (one != other).any(axis=2).mean() > 0.2
    with pytest.raises(ValueError, match="eagle eval --frames"):
        plot_depths([answer | {"line": 9} for answer in answers], needles, tmp_path / "none.png")
