"""Needles lie where they are said to lie, questions are answered by what is drawn, and the same settings give the same bytes."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_sampling import probe, read_frames
from eagle_train.cli.main import main
from eagle_train.data.prepare import prepare
from eagle_train.data.sample import normalise
from eagle_train.evaluation.metrics import Answer, score_of
from eagle_train.evaluation.needle import KINDS, NeedleError, Settings, build
from eagle_train.evaluation.needle.build import place
from eagle_train.evaluation.needle.cards import COLOURS, DIRECTIONS
from eagle_train.evaluation.options import options_of

SMALL = {"lengths": (6.0,), "depths": (0.0, 0.5, 1.0), "count": 1, "side": 64, "card_seconds": 0.25}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_card(pixels):
    """A white card has a black edge and a mostly white inside."""
    inside = pixels[6:-6, 6:-6]
    return pixels[0].mean() < 60 and pixels[-1].mean() < 60 and (inside.min(axis=2) > 200).mean() > 0.5


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(20, 400), st.floats(0, 1))
def test_cards_lie_inside_the_video_in_order_and_apart(lengths, total, depth):
    gap = round(0.1 * total) if len(lengths) > 1 else 0
    if sum(lengths) + gap * (len(lengths) - 1) > total:
        with pytest.raises(NeedleError, match="do not fit a video of"):
            place(lengths, total, depth)
        return
    starts = place(lengths, total, depth)
    assert starts[0] >= 0
    assert starts[-1] + lengths[-1] <= total
    for start, length, following in zip(starts, lengths, starts[1:]):
        assert following == start + length + gap
    if depth == 0:
        assert starts[0] == 0
    if depth == 1:
        assert starts[-1] + lengths[-1] == total


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needles") / "made"
    counts = build(folder, Settings(**SMALL))
    return folder, counts


def test_rows_are_accepted_and_name_what_is_there(made):
    folder, counts = made
    rows, needles = lines_of(folder / "rows.jsonl"), lines_of(folder / "needles.jsonl")
    assert counts == {"videos": 15, "rows": 60}
    assert [needle["line"] for needle in needles] == list(range(1, 61))
    for row, needle in zip(rows, needles):
        sample = normalise(row, "needle", root=folder, line=needle["line"])
        assert row["video"].startswith(f"videos/{needle['kind']}-6s-{needle['depth']:.2f}")
        assert len(sample.videos) == 1
        assert options_of(sample.messages[0]["content"]) is not None


def test_cards_are_shown_at_the_frames_that_are_stated_and_nowhere_else(made):
    folder, _ = made
    for needle, row in zip(lines_of(folder / "needles.jsonl")[::4], lines_of(folder / "rows.jsonl")[::4]):
        info = probe(folder / row["video"])
        assert (info.frame_count, info.fps, info.width, info.height) == (24, 4.0, 64, 64)
        pixels = read_frames(folder / row["video"], np.arange(24) / 4).pixels
        length = 2 if needle["kind"] == "motion" else 1
        shown = {start + index for start in needle["starts"] for index in range(length)}
        assert {index for index in range(24) if is_card(pixels[index])} == shown


def test_rotations_move_the_right_letter_through_all_places(made):
    rows = lines_of(made[0] / "rows.jsonl")
    for first in range(0, len(rows), 4):
        turns = [row["conversations"] for row in rows[first : first + 4]]
        assert {answer["value"] for _, answer in turns} == set("ABCD")
        right = {options_of(q["value"]).texts["ABCD".index(a["value"])] for q, a in turns}
        assert len(right) == 1
        answers = [Answer("n", line, q["value"], a["value"], a["value"], medium="v", metric="choice") for line, (q, a) in enumerate(turns)]
        assert score_of(answers)[:2] == (1, 1.0)
        assert score_of([answer._replace(given="A") for answer in answers])[:2] == (1, 0.0)


def closest(pixels):
    """The colour of the pixels that are neither white nor the edge."""
    inside = pixels[4:-4, 4:-4].reshape(-1, 3).astype(int)
    inside = inside[inside.min(axis=1) < 170]
    return min(COLOURS, key=lambda name: np.abs(np.median(inside, axis=0) - COLOURS[name]).sum())


@pytest.mark.parametrize("seed", range(8))
def test_answers_follow_from_the_pixels(seed):
    """Colours, numbers of cards, directions and numbers of dots are read from what is drawn."""
    rng = np.random.default_rng(seed)
    needle = KINDS["still"](rng, 64, 1)
    assert needle.options[0].split()[1] == closest(needle.clips[0][0])
    needle = KINDS["order"](rng, 64, 1)
    assert [part.split()[1] for part in needle.options[0].split(", ")] == [closest(clip[0]) for clip in needle.clips]
    needle = KINDS["count"](rng, 64, 1)
    assert int(needle.options[0]) == len(needle.clips)
    needle = KINDS["motion"](rng, 64, 4)
    centres = [np.argwhere(frame[4:-4, 4:-4].min(axis=2) < 170).mean(axis=0) for frame in needle.clips[0]]
    moved = centres[-1] - centres[0]
    assert max(DIRECTIONS, key=lambda name: moved @ DIRECTIONS[name][::-1]) == needle.options[0]
    needle = KINDS["linked"](rng, 128, 1)
    dots = [components(clip[0][8:-8, 8:-8].min(axis=2) < 170) for clip in needle.clips]
    clue = closest(needle.clips[dots.index(1)][0])
    counted = [number for number, clip in zip(dots, needle.clips) if number > 1 and closest(clip[0]) == clue]
    assert counted == [int(needle.options[0])]
    assert len(set(needle.options)) == 4


def components(mask):
    """Connected areas of a mask."""
    left, found = set(map(tuple, np.argwhere(mask).tolist())), 0
    while left:
        found += 1
        waiting = [left.pop()]
        while waiting:
            y, x = waiting.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    waiting.append(near)
    return found


def test_the_same_settings_give_the_same_bytes(made, tmp_path):
    build(tmp_path / "again", Settings(**SMALL))
    build(tmp_path / "other", Settings(**SMALL | {"seed": 1}))
    build(tmp_path / "fewer", Settings(**SMALL | {"kinds": ("motion",), "depths": (1.0,)}))

    def bytes_of(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    whole = bytes_of(made[0])
    assert bytes_of(tmp_path / "again") == whole
    assert bytes_of(tmp_path / "other")["rows.jsonl"] != whole["rows.jsonl"]
    fewer = bytes_of(tmp_path / "fewer")
    assert [whole[name] == fewer[name] for name in fewer if name.endswith(".mp4")] == [True]


def test_videos_of_the_user_are_hosts(tmp_path, write_video):
    (tmp_path / "hosts").mkdir()
    write_video(tmp_path / "hosts" / "long.mp4", frames=80)
    write_video(tmp_path / "hosts" / "short.mp4", frames=10)
    settings = {**SMALL, "kinds": ("still",), "hosts": (tmp_path / "hosts",)}
    build(tmp_path / "made", Settings(**settings))
    assert {needle["host"] for needle in lines_of(tmp_path / "made" / "needles.jsonl")} == {"long.mp4"}
    with pytest.raises(NeedleError, match=r"none of the 2 videos in .* lasts 60 s \(the longest: 8.0 s\)"):
        build(tmp_path / "longer", Settings(**settings | {"lengths": (60.0,)}))
    (tmp_path / "hosts" / "no.mp4").write_bytes(b"no video")
    with pytest.raises(NeedleError, match=r"no\.mp4 cannot be read as a video"):
        build(tmp_path / "broken", Settings(**settings))
    (tmp_path / "hosts" / "empty").mkdir()
    with pytest.raises(NeedleError, match=r"--host .*empty: the folder has no video files \(.*\.avi, .*\); name another one"):
        build(tmp_path / "none", Settings(**settings | {"hosts": (tmp_path / "hosts" / "empty",)}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "made"], "nothing is left of what failed"


def exit_code(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["needle", *map(str, arguments)])
    return ended.value.code or 0


def test_the_command_builds_rows_that_can_be_prepared(tmp_path, capsys, make_config, tokenizer):
    options = ["--kinds", "still", "--lengths", "4", "--depths", "0.5", "--count", "1", "--side", "32"]
    assert exit_code("build", tmp_path / "n", *options) == 0
    assert "1 videos, 4 rows" in capsys.readouterr().out
    facts = prepare(make_config({"n": {"annotation": "n/rows.jsonl"}}), tokenizer).facts
    assert len(facts) == 4
    for wrong, text in [
        (["--kinds", "stil"], "--kinds stil: known are still, motion, order, count, linked"),
        (["--depths", "2"], "a depth lies in 0 ... 1"),
        (["--depths", "0.001,0.002"], "0.00 comes twice"),
        (["--lengths", "4,4.0"], "4 comes twice"),
        (["--lengths", "x"], "--lengths x: expected numbers"),
        (["--lengths", "1", "--kinds", "order"], "do not fit a video of 4 frames"),
        ([], "is not an empty folder"),
    ]:
        target = "n" if not wrong else "other"
        assert exit_code("build", tmp_path / target, *options, *wrong) == 2
        assert text in capsys.readouterr().err
    assert exit_code("plot", tmp_path, tmp_path / "n") == 2
    assert "answers.jsonl: there is no such file" in capsys.readouterr().err
