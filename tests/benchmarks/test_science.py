"""Science in miniature: arms differ in one respect and get the same tokens; pictures, tables, and the driver that continues."""

import copy
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "packages" / "eagle-train" / "benchmarks" / "science"
NAMES = ("vocabulary", "letters", "clips", "data", "sizes", "experiments", "report", "single", "run", "evidence")


@pytest.fixture
def science(monkeypatch):
    """Imports a module of the folder; its modules import each other by their names alone, so they are forgotten afterwards."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(params=["small", "large"])
def runs(science, request):
    return science("experiments").all_runs(Path("data"), (0, 1), science("sizes").SIZES[request.param])


def tokens(run) -> int:
    return sum(stage["max_tokens"] * stage["packs_per_step"] * stage["steps"] for stage in run.config["stages"])


def test_configurations_are_valid_and_bases_come_first(runs):
    from eagle_train.config import parse_config

    seen = set()
    for run in runs:
        assert run.after is None or run.after in seen
        assert run.name not in seen
        seen.add(run.name)
        parse_config(copy.deepcopy(run.config))


def test_arms_of_an_experiment_get_the_same_tokens(runs):
    by_experiment = {}
    for run in runs:
        if run.experiment != "base":
            by_experiment.setdefault(run.experiment, set()).add(tokens(run))
    assert set(by_experiment) == {"video", "text", "tiling", "fill", "weighting"}
    assert all(len(found) == 1 for found in by_experiment.values()), by_experiment


@pytest.mark.parametrize(
    ("experiment", "differs"),
    [
        ("video", {"stages"}),
        ("text", {"data", "sampling"}),
        ("tiling", {"data"}),
        ("fill", {"sampling"}),
        ("weighting", {"stages"}),
    ],
)
def test_arms_differ_in_one_respect(runs, experiment, differs):
    first, *others = [run for run in runs if run.experiment == experiment and run.seed == 0]
    assert others
    for other in others:
        assert {key for key in first.config if first.config[key] != other.config[key]} == differs


@pytest.mark.parametrize(
    ("size", "grid"),
    # Values of InternVL's `find_closest_aspect_ratio` and `dynamic_preprocess` (tiles of 448 pixels, at most 12).
    [((800, 1300), (2, 3)), ((448, 448), (1, 1)), ((2000, 2000), (3, 3)), ((4480, 896), (5, 1)), ((1280, 720), (4, 2))],
)
def test_internvl_grid(science, size, grid):
    assert science("letters").internvl_grid(*size, 12, 448) == grid


def test_iap_gives_a_picture_in_the_size_of_a_grid_that_grid(science):
    from eagle_tiling import select_grid

    letters = science("letters")
    for aspect in letters.ASPECTS.values():
        image, letter = letters.draw(*letters.size_of(aspect, letters.LARGE), letters.HEIGHTS, np.random.default_rng(0))
        assert letter in letters.LETTERS
        reduced = letters.for_internvl(image, 12)
        grid = letters.internvl_grid(*image.size, 12)
        assert tuple(select_grid(*reduced.size, max_tiles=12, tile_size=letters.TILE)) == grid


@pytest.mark.parametrize(("size", "tokens"), [("small", 1), ("large", 4)])
def test_the_words_around_a_frame_are_nine_tokens_and_the_longest_context_has_512_frames(science, tmp_path, size, tokens):
    from eagle_model.prompt.costs import PromptCosts

    tokenizer = science("vocabulary").make_tokenizer(["What is on the card?", "red, green"], tmp_path / "tokenizer")
    costs = PromptCosts(tokenizer)
    assert costs.frames_tokens([0.0, 63.75, 127.75], tokens) == 3 * (9 + tokens)
    size = science("sizes").SIZES[size]
    assert (science("letters").TILE // size.frame_patch // 2) ** 2 == tokens
    assert costs.frames_tokens([number / 4 for number in range(512)], tokens) + 100 < size.video.tokens == size.contexts[-1]
    assert costs.digits_alike  # frames are planned exactly


def test_large_models_have_more_than_50_million_parameters(science, tmp_path):
    from eagle_train.config import parse_config
    from eagle_train.training.build import empty_model
    from eagle_train.training.model import load_run_tokenizer

    science("vocabulary").make_tokenizer(["What is on the card?", "red, green"], tmp_path / "tokenizer")
    for run in science("experiments").all_runs(tmp_path, (0,), science("sizes").LARGE)[:2]:
        config = parse_config(run.config)
        model = empty_model(config, load_run_tokenizer(config), weights=False).model
        assert 50e6 < sum(parameter.numel() for parameter in model.parameters()) < 60e6


def point(accuracy):
    return {"source": "still_512", "frames": 16, "accuracy": accuracy, "text_only": 0.2}


def run_result(seed, accuracy, **more):
    counts = {"parameters": 1, "steps": 2, "tokens": 3, "samples": 4, "loss": 0.5, "seconds": {"train": 1.0}}
    return {"experiment": "video", "arm": "longest", "seed": seed, "points": [point(accuracy)]} | counts | more


def test_the_table_has_the_mean_every_seed_and_what_failed(science):
    failed = {"experiment": "video", "arm": "longest", "seed": 2, "failed": "ValueError: no\n"}
    text = science("report").table({"runs": [run_result(1, 0.75), run_result(0, 0.25), failed]})
    assert "| video | longest | still_512 | 16 | 0.500 | 0.354 | 0.25 0.75 | 0.200 |" in text
    assert "| video | longest | 2 | failed: ValueError: no |" in text


def test_joined_results_have_every_run_once_and_its_machine(science):
    def content(machine, *runs):
        return {"settings": {"machine": machine, "parallel": 2}, "runs": list(runs)}

    stopped = {"experiment": "video", "arm": "longest", "seed": 1, "failed": "stopped at the deadline"}
    one, other = content("a", run_result(0, 0.25), stopped), content("b", run_result(0, 0.5), run_result(1, 0.75))
    joined = science("report").join([one, other])
    found = [(run["seed"], run["machine"], run["points"][0]["accuracy"]) for run in joined["runs"]]
    assert found == [(0, "a, 2 at a time", 0.25), (1, "b, 2 at a time", 0.75)]
    assert [(run["seed"], run["machine"]) for run in joined["repeated"]] == [(0, "b, 2 at a time")]
    assert "| video | longest | 0 | b, 2 at a time | 0.500 | still_512 0.50 |" in science("report").table(joined)
    joined = science("report").join([one, content("c", stopped)])
    assert [run.get("failed") for run in joined["runs"]] == [None, "stopped at the deadline"]
    assert not joined["repeated"]
    first = science("report").join([one, other]) | {"pilots": [1]}
    again = science("report").join([first, content("c", run_result(1, 0.5), run_result(2, 1.0))])
    assert [run["machine"] for run in again["runs"]] == ["a, 2 at a time", "b, 2 at a time", "c, 2 at a time"]
    assert [(run["seed"], run["machine"]) for run in again["repeated"]] == [(0, "b, 2 at a time"), (1, "c, 2 at a time")]
    assert [one["machine"] for one in again["settings"]] == ["a", "b", "c"]
    assert again["pilots"] == [1]


def test_single_runs_can_be_chosen_with_what_they_start_from(science, tmp_path):
    run = science("run")
    options = run.Options(tmp_path, tmp_path / "work", 1, 1.0, 3, 1.0, ("fill", "text-ads-2"), "small", False)
    names = [one.name for one in run.chosen(options)]
    assert names == [
        *("base-letters-0", "base-letters-1", "base-video-2", "base-letters-2", "text-ads-2"),
        *("tiling-iap-0", "tiling-iap-1", "tiling-iap-2"),
        *(f"fill-{arm}-{seed}" for seed in range(3) for arm in ("ads", "ads-fill")),
    ]
    assert options.media == ("clips", "images")
    assert options._replace(only=("text-ads-2",)).media == ("clips",)
    assert options._replace(only=("tiling-iap-0",)).media == ("images",)
    with pytest.raises(SystemExit, match=r"--only text-ad-2: neither"):
        run.chosen(options._replace(only=("text-ad-2",)))


@pytest.mark.parametrize(
    ("times", "starts", "length", "given"),
    [
        ((0.0, 1.0, 2.0), [4], 1, True),  # 4 frames a second
        ((0.0, 1.0, 2.0), [3], 1, False),
        ((0.0, 1.0, 2.0), [3], 2, True),
        ((0.0, 1.0, 2.0), [3, 7, 9], 2, False),
        ((0.0, 1.0, 2.0, 2.5), [3, 7, 9], 2, True),
        ((), [0], 1, False),
    ],
)
def test_evidence_is_given_if_a_frame_of_every_card_is_read(science, times, starts, length, given):
    assert science("evidence").seen(times, (starts, length)) is given


def test_the_driver_continues_and_names_what_is_missing(science, tmp_path, monkeypatch, capsys):
    run = science("run")
    options = run.Options(tmp_path, tmp_path / "work", 2, 1e9, 1, 1.0, (), "small", False)
    options.runs.mkdir(parents=True)
    monkeypatch.setattr(run, "machine", lambda device: device)
    monkeypatch.setattr(run.Queue, "_process", lambda self, one: pytest.fail(f"{one.name} was started"))
    every = run.chosen(options)
    made = {one.name: run.about(one) | run_result(0, 0.5) | run.about(one) for one in every}
    for one in every[1:]:
        (options.runs / f"{one.name}.json").write_text(json.dumps(made[one.name] | {"configuration": run.digest(one, options.work)}))
    (options.runs / f"{every[0].name}.json").write_text(json.dumps(made[every[0].name] | {"configuration": "another"}))
    queue = run.Queue(every, options, 0.0)
    assert [one.name for one in queue.waiting] == [every[0].name]
    assert queue.done == {one.name for one in every[1:]}
    queue.waiting.clear()
    queue.go()
    content = json.loads((tmp_path / "science.json").read_text())
    assert len(content["runs"]) == len(every) - 1
    capsys.readouterr()


def test_runs_are_spread_over_the_gpus(science, tmp_path, monkeypatch):
    run = science("run")
    options = run.Options(tmp_path, tmp_path / "work", 3, 1e9, 2, 1.0, (), "large", False)
    options.runs.mkdir(parents=True)
    monkeypatch.setattr(run, "machine", lambda device: device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    started = []
    monkeypatch.setattr(run.subprocess, "Popen", lambda command, **given: started.append((command, given["env"]["CUDA_VISIBLE_DEVICES"])))
    queue = run.Queue(run.chosen(options), options, 0.0)
    queue._start()
    assert [gpu for _, gpu in started] == ["1", "3", "1"]
    assert all(command[command.index("--size") + 1] == "large" for command, _ in started)
    del queue.running["base-video-0"], queue.running["base-video-1"]  # on GPU 1
    queue._start()
    assert [gpu for _, gpu in started[3:]] == ["1"]  # the last base


def test_a_run_whose_base_failed_is_named(science, tmp_path, monkeypatch, capsys):
    run = science("run")
    options = run.Options(tmp_path, tmp_path / "work", 2, 1e9, 1, 1.0, ("fill",), "small", False)
    options.runs.mkdir(parents=True)

    class Ended:
        returncode = 3

        def poll(self):
            return 3

    monkeypatch.setattr(run, "machine", lambda device: device)
    monkeypatch.setattr(run.Queue, "_process", lambda self, one: Ended())
    run.Queue(run.chosen(options), options, 0.0).go()
    failed = {(one["experiment"], one["arm"]): one["failed"] for one in json.loads((tmp_path / "science.json").read_text())["runs"]}
    assert failed == {
        ("base", "letters"): "exit status 3",
        ("tiling", "iap"): "base-letters-0 failed",
        ("fill", "ads"): "tiling-iap-0 failed",
        ("fill", "ads-fill"): "tiling-iap-0 failed",
    }
    assert "FAILED: exit status 3" in capsys.readouterr().out
