"""The quickstart's data: questions are all there, first questions don't give second answers away, videos show what rows state."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eagle_sampling import choose_times, probe, read_frames, wanted_frames
from eagle_train.config import parse_config
from eagle_train.evaluation.scoring import final_answer
from eagle_train.quickstart.build import MODEL, Size, build, configuration
from eagle_train.quickstart.easy_vqa_data import (
    COLOURS,
    SHAPES,
    Turn,
    about_shape,
    comparison_rows,
    description,
    is_negated,
    load_split,
    pair_turns,
    sentence_rows,
    states_answer,
    usual_answers,
)
from eagle_train.quickstart.videos import FPS, FRAMES_PER_SCENE, IN_ORDER, LONGEST_ORDER, Clip, encode, turns_about

TURNS = [
    Turn("what shape is in the image?", "circle"),
    Turn("what is the blue shape?", "circle"),
    Turn("what color is the shape?", "blue"),
    Turn("what is the color of the circle?", "blue"),
    Turn("is there a triangle?", "no"),
    Turn("is there not a blue shape?", "no"),
]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(TURNS), max_size=12), st.integers(0, 99))
def test_pairs_use_every_turn_once_and_state_no_answer_early(turns, seed):
    rows = pair_turns(turns, np.random.default_rng(seed))
    assert sorted(turn for row in rows for turn in row) == sorted(turns)
    for row in rows:
        assert 1 <= len(row) <= 2
        if len(row) == 2:
            assert about_shape(row[0]) != about_shape(row[1])
            assert not states_answer(row[0])


def test_descriptions_come_from_the_questions():
    assert description(TURNS) == "a blue circle"
    assert description(TURNS[:1]) is None
    assert description(TURNS[4:]) is None


def test_every_question_of_the_package_is_used():
    split = load_split("test")
    assert len(split.paths) == 1000
    assert sum(map(len, split.turns.values())) == 9673
    texts = [text for turns in split.turns.values() if (text := description(turns))]
    assert len(texts) > 600
    assert {word for text in texts for word in text.split()} == {"a", *SHAPES, *COLOURS}


def test_comparisons_are_balanced_right_and_leave_the_blind_answers_as_they_are():
    """Reasons are what the description says and what the question names; the most frequent answer of a question stays what it is."""
    split = load_split("train")
    shown, told = comparison_rows(split, "images.lmdb", (0, 2), np.random.default_rng(0)), sentence_rows(split, np.random.default_rng(1))
    usual = usual_answers(split)
    counted = {question: Counter() for question in usual}
    for turns in split.turns.values():
        for turn in turns:
            if turn.question in usual:
                counted[turn.question][turn.answer] += 1
    talks = [[turn["value"] for turn in row["conversations"]] for row in shown]
    described = [(texts[1], texts[2:]) for texts in talks]
    for row in told:
        first, *rest = (turn["value"] for turn in row["conversations"])
        text, _, question = first.partition(". ")
        described.append((text, [question, *rest]))
    unusual = questions = 0
    for text, turns in described:
        for question, reasoned in zip(turns[::2], turns[1::2]):
            reasons, answer = final_answer(reasoned, "so ")
            named, (found,) = (set(some.replace("?", "").split()) & {*SHAPES, *COLOURS} for some in (question, reasons))
            assert found in text.split()
            assert (found in named) == ("as asked" in reasons) == ((answer == "yes") != is_negated(Turn(question, "")))
            counted[question][answer] += 1
            questions += 1
            unusual += answer != usual[question]
    assert len(described) == 3 * len(told)
    assert 0.35 < unusual / questions < 0.5
    assert {question: answers.most_common(1)[0][0] for question, answers in counted.items()} == usual


def test_videos_are_h264_and_show_their_scenes(tmp_path):
    colours = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    encode(tmp_path / "a.mp4", [Image.new("RGB", (64, 64), colour) for colour in colours])
    info = probe(tmp_path / "a.mp4")
    assert info.codec == "h264"
    assert info.frame_count == 3 * FRAMES_PER_SCENE
    assert info.duration == pytest.approx(3 * FRAMES_PER_SCENE / FPS)
    frames = read_frames(tmp_path / "a.mp4", [0.0, 0.75, 1.25], None)
    for pixels, colour in zip(frames.pixels, colours):
        assert np.abs(pixels.mean((0, 1)) - colour).max() < 12


@given(st.integers(2, LONGEST_ORDER))
def test_the_model_gets_every_scene_of_a_short_clip_once(scenes):
    """And numbers of the answer about the order are those of the frames in the prompt."""
    sampling = parse_config(configuration(Path("quickstart-data"))).sampling
    count = wanted_frames(scenes * FRAMES_PER_SCENE / FPS, sampling.fps, sampling.max_frames, min_frames=sampling.min_frames)
    times = choose_times(np.arange(scenes * FRAMES_PER_SCENE) / FPS, count, placement=sampling.placement)
    assert [int(time * FPS) // FRAMES_PER_SCENE for time in times] == list(range(scenes))
    texts = [f"a {COLOURS[number % 8]} {SHAPES[number % 3]}" for number in range(scenes)]
    (answer,) = (turn.answer for turn in turns_about(Clip(Path("clip.mp4"), tuple(texts))) if turn.question == IN_ORDER)
    assert answer.split(", ") == [f"{number} {text[2:]}" for number, text in enumerate(texts, 1)]


def test_long_clips_have_no_question_about_the_order():
    turns = turns_about(Clip(Path("clip.mp4"), ("a red circle",) * (LONGEST_ORDER + 1)))
    assert {turn.answer for turn in turns} == {"a red circle"}


def test_an_interrupted_build_is_made_anew_and_a_whole_one_is_found(tmp_path):
    size = Size(images=12, positions=2, train_clips=2, test_clips=1)
    folder = tmp_path / "quickstart-data"
    counts = build(folder, size)
    made = (folder / "questions.jsonl").stat().st_mtime_ns
    assert build(folder, size) == counts
    assert (folder / "questions.jsonl").stat().st_mtime_ns == made
    (folder / "made.json").unlink()
    assert build(folder, size) == counts
    assert (folder / "questions.jsonl").stat().st_mtime_ns != made
    assert counts["test_questions"] > 80


def test_its_configuration_is_a_valid_one(tmp_path):
    config = parse_config(configuration(tmp_path / "quickstart-data"), base=tmp_path)
    lengths = [stage.max_tokens for stage in config.stages]
    assert len(lengths) == 3
    assert lengths == sorted(set(lengths))
    assert config.model.overrides == MODEL
