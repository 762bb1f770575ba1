"""A run from every format of rows, from files and over HTTP, interrupted and resumed, evaluated and shown: it is the run from JSONL."""

import pytest

from tests.support.http_files import FileServer
from tests.support.runs import colour_sources, colour_sources_run, outcome, train_in_parts
from tests.support.tables import tables

pytest.importorskip("aiohttp")
QUICK = (("http", "parquet"), ("http", "tar"))
ALL = tuple((place, name) for place in ("file", "http") for name in ("jsonl", "json", "csv", "parquet", "arrow", "tar", "jsonl.zst"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder with the media, and the rows for training and evaluation in every format."""
    folder = tmp_path_factory.mktemp("sources")
    for name, rows in zip(("rows", "held_out"), colour_sources(folder)):
        (folder / name).mkdir()
        tables(folder / name, rows)
    return folder


@pytest.fixture(scope="module")
def expected(sources, tmp_path_factory):
    config = colour_sources_run(tmp_path_factory.mktemp("run"), "run", f"{sources}/rows.jsonl", f"{sources}/held_out.jsonl")
    found = outcome(config, train_in_parts(config, stop_at=None))
    assert (len(found["steps"]), len(found["evaluations"]), len(found["ledger"])) == (4, 1, 1)  # steps: with the evaluation
    return found


@pytest.mark.parametrize(("place", "name"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in QUICK)])
def test_a_run_from_every_format_is_that_from_jsonl(sources, expected, tmp_path, place, name):
    with FileServer(sources) as server:
        root = server.address if place == "http" else str(sources)
        remote = {"schemes": ["http"], "cache": str(tmp_path / "cache"), "retries": 0} if place == "http" else {}
        given = {
            f"{kind}sources": {name_: {"annotation": f"{root}/{folder}/rows.{name}", "root": root}}
            for kind, name_, folder in (("", "rows", "rows"), ("eval_", "held", "held_out"))
        }
        config = colour_sources_run(tmp_path, "run", "", "", **given, remote=remote)
        found = outcome(config, train_in_parts(config, stop_at=2))
    for part, value in expected.items():
        assert found[part] == value, part
