"""What users get wrong: names, chapters, seed sets, answers. Each is an entry of the ledger or an error that names it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_train.config import ConfigError
from eagle_train.curate import endpoint
from eagle_train.curate.annotate import annotate
from eagle_train.curate.chapters import BadChapters, load_chapters
from eagle_train.curate.check import check
from eagle_train.curate.embed import embed
from eagle_train.curate.folder import CurateError, Folder
from eagle_train.curate.select import select
from eagle_train.curate.settings import parse_curation
from eagle_train.curate.split import split
from tests.train.curate.conftest import ENCODER, film
from tests.train.curate.stub import plain_answers, serving


@pytest.fixture
def curation(tmp_path):
    """A configuration of two videos: a.mp4 with a cut at 3 s, and b.mp4."""
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "a.mp4", [30, 20])
    film(tmp_path / "videos" / "b.mp4", [30], first_seed=10)

    def make(address="http://127.0.0.1:9/v1", **sections):
        server = {"base_url": address, "model": "stub", "concurrency": 1, "retries": 0, **sections.pop("endpoint", {})}
        content = {
            "folder": "out",
            "videos": ["videos"],
            "workers": 1,
            "embed": {"encoder": ENCODER},
            "select": {"tau": 1},
            "annotate": {"modes": ["bottom_up"], "endpoint": server, "side": 32},
        }
        return parse_curation(content | sections, base=tmp_path)

    return make


def entries(config):
    return {(Path(entry.source).name, entry.where.split()[1], entry.reason): entry.detail for entry in Folder(config.folder).ledger}


def selected(config):
    split(config)
    embed(config)
    select(config)


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_a_name_that_is_not_utf8_goes_to_the_ledger(tmp_path, curation):
    try:
        shutil.copy(tmp_path / "videos" / "a.mp4", os.fsencode(tmp_path / "videos") + b"/\xff.mp4")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    config = curation()
    assert split(config).num_rows == 3
    assert list(entries(config)) == [("\\udcff.mp4", "split", "bad-name")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as chapters"),
        ('{"foo": 1}', "expected annotations"),
        ('[{"start": NaN, "title": "x"}]', "start nan"),
        ('[{"start": -5, "title": "x"}]', "start -5"),
        ('[{"start": 5, "end": 2, "title": "x"}]', "end 2"),
        ('[{"start": true, "title": "x"}]', "true or false"),
        ('[{"start": 0, "title": null}]', "title None"),
        ('{"timestamps": [[0, 1], [1, 2]], "sentences": ["x"]}', "as many sentences"),
    ],
)
def test_a_bad_sidecar_costs_its_video_alone(tmp_path, curation, content, message):
    (tmp_path / "videos" / "a.chapters.json").write_text(content)
    (tmp_path / "videos" / "b.chapters.json").write_text('[{"start": 0, "title": "whole"}]')
    config = curation(split={"method": "chapters"})
    assert split(config)["title"].to_pylist() == ["whole"]
    ((name, detail),) = entries(config).items()
    assert name == ("a.mp4", "split", "bad-chapters")
    assert "a.chapters.json" in detail
    assert message in detail
    (tmp_path / "all.json").write_text(f'{{"a.mp4": {content}}}')
    with pytest.raises(BadChapters, match=r"all\.json"):
        load_chapters(tmp_path / "all.json")


def test_titles_in_any_script_reach_the_questions(tmp_path, curation):
    """What is not Unicode is replaced: no file could hold it."""
    titles = ["Ünïcødé 章节 🎬 {x}", "ثاني \ud83d"]
    (tmp_path / "videos" / "a.chapters.json").write_text(json.dumps([{"start": 0, "title": titles[0]}, {"start": 3, "title": titles[1]}]))
    prompts = []

    def answers(schema, prompt, images):
        prompts.append(prompt)
        return plain_answers(schema, prompt, images)

    with serving(answers) as stub:
        config = curation(stub.address)
        config = config.replaced(annotate=config.annotate.replaced(modes=["top_down"]))
        selected(config)
        annotate(config)
    assert any(titles[0] in prompt for prompt in prompts)
    assert any("ثاني ?" in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (pa.array(["x", "y"]), "holds string"),
        (pa.array([[1.0, 0.0], None], pa.list_(pa.float32())), "expected numbers of one width"),
        (pa.array([[1.0, 0.0], [1.0]], pa.list_(pa.float32())), "expected numbers of one width"),
        (pa.array([[1.0, 0.0], [1.0, None]], pa.list_(pa.float32())), "expected numbers of one width"),
        (pa.array([[1.0, 0.0], [float("nan"), 0.0]], pa.list_(pa.float32())), "row 2 has the length nan"),
        (pa.array([[0.6, 0.8], [6.0, 8.0]], pa.list_(pa.float32())), "row 2 has the length 10"),
        (pa.array([[0.6, 0.8], [1.0, 0.0]], pa.list_(pa.float32())), "embed both with the same encoder"),
        (None, "No match for FieldRef"),
    ],
)
def test_seed_files_that_embed_did_not_write_are_refused(tmp_path, curation, vectors, message):
    columns = {"start": [0.0, 1.0], "end": [1.0, 2.0]}
    pq.write_table(pa.table(columns if vectors is None else columns | {"vector": vectors}), tmp_path / "seed.parquet")
    config = curation(select={"seed": ["seed.parquet"]})
    split(config)
    embed(config)
    with pytest.raises(ConfigError, match=rf"select.seed: .*{message}"):
        select(config)


def test_pairs_of_other_types_twice_or_missing_are_named(curation):
    def answers(schema, prompt, images):
        types = [line[2:].partition(":")[0] for line in prompt.splitlines() if line.startswith("- ")]
        if schema != "Pairs":
            return plain_answers(schema, prompt, images)
        return {"pairs": [{"type": kind, "question": "What is it?", "answer": "A cat."} for kind in (types[0], types[0], "weather")]}

    with serving(answers) as stub:
        config = curation(stub.address)
        config = config.replaced(annotate=config.annotate.replaced(anchors=["clip"]))
        selected(config)
        report = annotate(config)
    assert report.rows == 3  # one of each clip
    details = [entry.detail for entry in Folder(config.folder).ledger if entry.where == "curate annotate"]
    for text in ("has no pair of type", "a further pair has type", "the pair has type 'weather'"):
        assert sum(text in detail for detail in details) == 3


def test_an_endpoint_that_never_answers_ends_the_run_early(curation):
    """Three requests instead of twenty: each one takes (retries + 1) x timeout, here no time, by default ten minutes."""
    config = curation()
    selected(config)
    with pytest.raises(CurateError, match=r"\d+ requests in a row got no answer.*check that the endpoint runs"):
        annotate(config)


@pytest.mark.parametrize(
    ("misbehaviour", "message"),
    [
        ("wrong", r"pairs: Field required"),
        ((400, {"error": {"message": "json_schema is not known"}}), "json_schema is not known"),
        *(
            ((200, body), "not a chat completion")
            for body in (
                {"hello": 1},
                {"choices": "x"},
                {"choices": [1]},
                {"choices": [{"message": "x"}], "usage": "x"},
                {"choices": [{"message": {"content": [1]}}]},
            )
        ),
    ],
)
def test_a_model_without_one_usable_answer_ends_the_run(curation, monkeypatch, misbehaviour, message):
    """It would cost requests for every clip of the set."""
    monkeypatch.setattr(endpoint, "SILENCE", 2)
    with serving(plain_answers, lambda number: misbehaviour) as stub:
        config = curation(stub.address)
        selected(config)
        with pytest.raises(CurateError, match=rf"none of \d+ requests had a usable answer.*{message}.*Check that the model"):
            annotate(config)
    with serving(plain_answers, lambda number: misbehaviour if number >= 2 else None) as stub:  # the first clip was answered
        assert annotate(curation(stub.address)).rows > 0


def test_damaged_answers_are_requested_again(curation):
    with serving(plain_answers) as stub:
        config = curation(stub.address)
        selected(config)
        annotate(config)
        rows, sent = Folder(config.folder).read("annotate"), len(stub.requests)
        path = config.folder / "answers.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0][:40] + lines[1], b"\0\0\n", b"[]\n", b'{"key": "x"}\n', *lines[2:]]))
        annotate(config)
        assert len(stub.requests) == sent + 2
    assert Folder(config.folder).read("annotate").equals(rows)


@pytest.mark.parametrize("response", ["x", 3, {"status_code": 500}, {"status_code": 200}, {"status_code": 200, "body": []}])
def test_results_of_a_batch_without_a_completion_stay_pending(tmp_path, curation, response):
    config = curation()
    selected(config)
    report = annotate(config, batch_out=tmp_path / "requests.jsonl")
    names = [json.loads(line)["custom_id"] for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    results = [json.dumps({"custom_id": name, "response": response}) for name in names]
    (tmp_path / "results.jsonl").write_text("\n".join(results) + "\n")
    again = annotate(config, batch_in=tmp_path / "results.jsonl", batch_out=tmp_path / "next.jsonl")
    assert again.pending == report.pending == len(names)


def test_an_address_without_a_scheme_is_refused(curation):
    with pytest.raises(ConfigError, match=r"annotate\.endpoint\.base_url: .*http://"):
        curation("127.0.0.1:8000/v1")


def test_a_model_that_refuses_to_guess_does_not_know_the_answer(curation):
    with serving(plain_answers) as stub:
        config = curation(stub.address)
        selected(config)
        annotate(config)
    with serving(plain_answers, lambda number: "refuse") as stub:
        config = curation(stub.address, check={"anchor_model": False})
        report = check(config)
    assert report.removed == {}
    assert report.rows == len(Folder(config.folder).read("annotate"))


def test_clips_shorter_than_a_second_have_a_frame(curation):
    config = curation(split={"method": "fixed", "seconds": 0.05, "min_seconds": 0.01})
    clips = split(config)
    assert np.allclose(clips["end"].to_numpy() - clips["start"].to_numpy(), 0.05)
    table = embed(config)
    assert table.num_rows == clips.num_rows == 160
    assert set(table["frames"].to_pylist()) == {1}


def test_a_video_that_is_gone_after_split_costs_its_clips_alone(tmp_path, curation):
    config = curation()
    clips = split(config)
    (tmp_path / "videos" / "b.mp4").unlink()
    assert embed(config)["clip"].to_pylist() == clips["clip"].to_pylist()[:2]
    assert list(entries(config)) == [("b.mp4", "embed", "bad-video")]
    (tmp_path / "videos" / "a.mp4").unlink()
    shutil.rmtree(config.folder / "parts" / "embed")
    assert embed(config).num_rows == 0
    assert len(Folder(config.folder).ledger.counts()) == 1
    with pytest.raises(CurateError, match=r"embed\.parquet has no rows"):
        select(config)
