"""Annotation and checks against a server on the loopback interface that also misbehaves."""

import json
import pickle

import pyarrow as pa
import pytest

pytest.importorskip("openai")

from eagle_train.config import ConfigError
from eagle_train.curate import endpoint
from eagle_train.curate.annotate import anchored, annotate, draw_types
from eagle_train.curate.answers import Answers, NoAnswer
from eagle_train.curate.check import anchor_problem, check, leaks, script_share
from eagle_train.curate.embed import embed
from eagle_train.curate.endpoint import Endpoint
from eagle_train.curate.folder import CurateError, Folder
from eagle_train.curate.select import select
from eagle_train.curate.settings import parse_curation
from eagle_train.curate.split import split
from eagle_train.data.recipe import load_recipe
from tests.train.curate.conftest import ENCODER
from tests.train.curate.stub import completion, plain_answers, serving


@pytest.fixture
def ready(tmp_path, three_videos):
    """A curation up to select, for an endpoint's address; 6 clips of 3 videos."""

    def make(address="http://127.0.0.1:9/v1", **changes):
        endpoint = {"base_url": address, "model": "m", "retries": 2, "timeout": 1.0, "concurrency": 3, **changes.pop("endpoint", {})}
        annotation = {"endpoint": endpoint, "side": 64, "anchors": ["clip", "time", "context"], **changes.pop("annotate", {})}
        selection = {"tau": 1.0, "duplicate": 1.0}
        content = {"folder": "out", "videos": ["videos"], "workers": 1, "embed": {"encoder": ENCODER}, "select": selection}
        config = parse_curation({**content, "annotate": annotation, **changes}, base=tmp_path)
        if not (tmp_path / "out" / "select.parquet").exists():
            for step in (split, embed, select):
                step(config)
        return config

    return make


def read(config, step="annotate"):
    return Folder(config.folder).read(step).to_pylist()


def reasons(config, step="annotate"):
    return {reason: number for (where, reason), number in Folder(config.folder).ledger.counts().items() if where == f"curate {step}"}


def test_both_directions_and_all_anchors(ready):
    with serving(plain_answers) as stub:
        config = ready(stub.address)
        report = annotate(config)
    rows = read(config)
    assert report.rows == len(rows) == 6 * 2 * 3 + 3 * 3
    assert {row["mode"] for row in rows} == {"clip", "time", "context", "top_down"}
    assert len({row["id"] for row in rows}) == len(rows)
    clip = next(row for row in rows if row["mode"] == "time" and row["start"] == 3.0)
    assert clip["question"].startswith("Between 3.0 s and 5.0 s, what of kind")
    assert clip["whole"]
    assert stub.schemas == {"Pairs": 6 + 3, "Context": 12, "Caption": 3}
    assert stub.most <= 3
    shown = [sum(part["type"] == "image_url" for part in body["messages"][1]["content"]) for body in stub.requests]
    assert max(shown) == 18  # a.mp4 has 9 s at 2 frames a second
    assert report.account.input_tokens == sum(100 + images for images in shown)


def test_a_second_run_sends_nothing_and_gives_the_same(ready):
    with serving(plain_answers) as stub:
        config = ready(stub.address)
        annotate(config)
        first, sent = read(config), len(stub.requests)
        report = annotate(config)
        assert len(stub.requests) == sent
        assert report.account.known == sent
    assert read(config) == first


def test_a_server_that_misbehaves_costs_time_and_no_rows(ready):
    with serving(plain_answers) as stub:
        config = ready(stub.address)
        annotate(config)
        expected = read(config)
    (config.folder / "answers.jsonl").unlink()
    troubles = {0: (429, {"error": {"message": "slow down"}}), 2: (500, {"error": {"message": "oops"}}), 4: "cut", 6: "wrong", 8: "sleep"}
    with serving(plain_answers, troubles.get) as stub:
        config = ready(stub.address)
        annotate(config)
    assert read(config) == expected
    assert reasons(config) == {}


def test_what_is_refused_or_never_right_goes_to_the_ledger(ready):
    with serving(plain_answers, lambda number: "refuse" if number == 0 else None) as stub:
        config = ready(stub.address, annotate={"modes": ["bottom_up"]})
        annotate(config)
    assert reasons(config) == {"refused": 1}
    assert len(read(config)) == 5 * 6
    (config.folder / "answers.jsonl").unlink()

    def wrong(schema, prompt, images):
        return {"anchor": ""} if schema == "Context" else plain_answers(schema, prompt, images)

    with serving(wrong) as stub:
        config = ready(stub.address, annotate={"modes": ["bottom_up"]})
        annotate(config)
    assert reasons(config) == {"bad-answer": 12}
    assert {row["mode"] for row in read(config)} == {"clip", "time"}


def test_an_endpoint_that_falls_silent_ends_the_run_with_the_next_step(ready, monkeypatch):
    """After its first answer; one that never answers is in test_bad_input.py."""
    monkeypatch.setattr(endpoint, "SILENCE", 5)
    with serving(plain_answers, lambda number: (503, {"error": {"message": "down"}}) if number else None) as stub:
        config = ready(stub.address, endpoint={"retries": 0, "concurrency": 1})
        with pytest.raises(CurateError, match=r"\d+ requests in a row got no answer.*check that the endpoint runs"):
            annotate(config)


def test_a_wrong_key_and_a_missing_model_are_named(ready):
    with serving(plain_answers, lambda number: (401, {"error": {"message": "bad key"}})) as stub:
        with pytest.raises(CurateError, match=r"bad key.*; check annotate.endpoint .* OPENAI_API_KEY"):
            annotate(ready(stub.address))
    with pytest.raises(ConfigError, match=r"annotate.endpoint.model is not given"):
        annotate(ready(endpoint={"model": ""}))


def test_the_cost_is_counted_and_limited(ready):
    with serving(plain_answers) as stub:
        config = ready(stub.address, endpoint={"input_price": 1e6, "max_cost": 500.0, "concurrency": 1})
        with pytest.raises(CurateError, match=r"max_cost = 500.0 is spent; every answer is kept"):
            annotate(config)
        assert 4 <= len(stub.requests) <= 6


def test_a_cut_line_of_the_answers_is_removed(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer = {"content": "{}", "refusal": None, "finish": "stop", "input_tokens": 1, "output_tokens": 1}
    Answers(path).add("a", "clip", answer)
    with open(path, "ab") as file:
        file.write(b'{"key": "b", "purp')
    answers = Answers(path)
    answers.add("c", "clip", answer)
    again = Answers(path)
    assert again.get("a") is not None
    assert again.get("b") is None
    assert again.get("c") is not None


def test_batch_files_lead_to_the_same_rows(ready, tmp_path):
    with serving(plain_answers) as stub:
        config = ready(stub.address)
        annotate(config)
    expected = read(config)
    (config.folder / "answers.jsonl").unlink()
    results, rounds = None, 0
    while True:
        report = annotate(config, batch_out=tmp_path / "requests.jsonl", batch_in=results)
        if not report.pending:
            break
        rounds += 1
        lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
        assert len(lines) == report.pending
        assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
        results = tmp_path / "results.jsonl"
        answers = [
            {
                "custom_id": line["custom_id"],
                "response": {"status_code": 200, "body": completion(line["body"], plain_answers)},
                "error": None,
            }
            for line in lines
        ]
        if rounds == 1:  # one request of the batch fails: it is written again
            answers[0]["response"] = {"status_code": 500, "body": {}}
        results.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    assert rounds >= 2
    assert read(config) == expected


def test_a_missing_answer_can_be_sent_between_processes():
    problem = pickle.loads(pickle.dumps(NoAnswer("bad-frames", "gone")))
    assert (problem.reason, problem.detail, str(problem)) == ("bad-frames", "gone", "bad-frames: gone")


def test_results_are_not_written_over(ready, tmp_path):
    with pytest.raises(ConfigError, match="name another file"):
        annotate(ready(), batch_in=tmp_path / "a.jsonl", batch_out=tmp_path / "a.jsonl")


def test_checks_remove_with_reasons_and_the_recipe_is_read(ready):
    def answers(schema, prompt, images):
        if schema == "Guess" and "kind action" in prompt:
            return {"answer": "A thing of action."}
        if schema == "Leak" and "kind counting" in prompt:
            return {"leaks": True}
        return plain_answers(schema, prompt, images)

    with serving(answers) as stub:
        config = ready(stub.address)
        annotate(config)
        rows = read(config)
        report = check(config)
    kept = read(config, "check")
    assert report.rows + sum(report.removed.values()) == len(rows)
    assert report.removed == reasons(config, "check")
    assert not any("kind action" in row["question"] for row in kept)
    assert not any(row["mode"] == "context" and row["type"] == "counting" for row in kept)
    assert sum(report.mixture["duration"].values()) == report.rows
    recipe = load_recipe(config.folder / "recipe.yaml")
    samples = [json.loads(line) for line in recipe.sources["curated"].annotation.read_text().splitlines()]
    assert [sample["id"] for sample in samples] == [row["id"] for row in kept]


@pytest.mark.parametrize(
    ("anchor", "question", "answer", "leaking"),
    [
        ("When the red car stops", "What colour is the car?", "Red", True),
        ("When the car stops", "What colour is the car?", "Red", False),
        ("When he says 42 to her", "Which number?", "It is 42.", True),
        ("When the car stops", "Does the car stop?", "Yes", False),
        ("当红色的车停下", "车是什么颜色?", "红色", True),
    ],
)
def test_leaking_anchors(anchor, question, answer, leaking):
    assert leaks(anchor, question, answer) is leaking


def test_time_anchors_stay_inside_their_clip():
    row = {"anchor": "Between 3.0 s and 5.0 s", "mode": "time", "start": 3.0, "end": 5.0}
    assert anchor_problem(row) is None
    assert anchor_problem({**row, "end": 4.0})[0] == "anchor-outside"


def test_small_functions():
    assert anchored("When it rains,", "What is he doing?") == "When it rains, what is he doing?"
    assert anchored("When it rains", "NASA is what?") == "When it rains, NASA is what?"
    assert script_share("Привет", "LATIN") == 0
    assert script_share("12 %", "LATIN") == 1
    assert draw_types(list("abcdef"), 3, "x") == draw_types(list("fedcba"), 3, "x")
    assert len(draw_types(list("ab"), 9, "x")) == 2


def test_the_key_of_a_request_covers_what_is_shown(tmp_path, ready):
    from eagle_train.curate.annotate import Caption
    from eagle_train.curate.endpoint import Request
    from eagle_train.curate.shown import Shown

    endpoint = Endpoint(ready().annotate.endpoint, tmp_path / "answers.jsonl")
    base = Request("caption", "s", "p", Shown("v", "content", (0.0, 1.0), 64), Caption)
    keys = {
        endpoint.key(request)
        for request in (
            base,
            base._replace(prompt="q"),
            base._replace(shown=base.shown._replace(times=(0.0, 2.0))),
            base._replace(shown=base.shown._replace(content="other")),
            base._replace(shown=None),
        )
    }
    assert len(keys) == 5
    assert endpoint.key(base._replace(shown=base.shown._replace(video="moved"))) in keys


def test_an_empty_selection_is_named(ready):
    config = ready()
    folder = Folder(config.folder)
    folder.write("select", folder.read("select").slice(0, 0), [])
    with pytest.raises(CurateError, match=r"select.parquet has no rows"):
        annotate(config)
    assert isinstance(folder.read("select"), pa.Table)
