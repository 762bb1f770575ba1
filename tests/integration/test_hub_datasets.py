"""Datasets of the Hugging Face hub by name: from the library's cache when the hub is out of reach, and what is said otherwise."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_train.config import ConfigError, HubDataset, parse_config
from eagle_train.data.prepare import load_facts, prepare
from eagle_train.data.sample import load_sample
from eagle_train.data.sources import hub
from tests.support import media
from tests.support.models import byte_tokenizer
from tests.support.tables import talk

pytest.importorskip("datasets")

# In a process of its own: the libraries read the variables when they are imported.
SCRIPT = """
import json, os, sys, shutil
from pathlib import Path
import datasets
from eagle_train.config import HubDataset
from eagle_train.data.sources import hub

home, commit, given = Path(os.environ["HF_HOME"]), sys.argv[1], json.loads(sys.argv[2])
made = Path(datasets.load_dataset("parquet", data_files=str(home / "rows.parquet"), split="train").cache_files[0]["filename"])
folder = home / "datasets/owner___name/default/0.0.0" / commit
shutil.copytree(made.parent, folder)
(folder / made.name).rename(folder / "name-train.arrow")
for one in given:
    try:
        print(json.dumps(hub.files_of(HubDataset(**one))))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


GIVEN = (
    {"hub": "owner/name"},
    {"hub": "owner/name", "revision": COMMIT},
    {"hub": "owner/name", "revision": "main"},
    {"hub": "owner/name", "split": "test"},
    {"hub": "owner/name", "subset": "other"},
    {"hub": "owner/other"},
)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """(the Arrow file of a dataset in HF_HOME, as `datasets` leaves it after a download; what `files_of` makes of GIVEN, offline)"""
    home = tmp_path_factory.mktemp("home")
    pictures = [{"bytes": media.encoded(media.random_image(number, (40 + number, 30)), "PNG"), "path": None} for number in range(3)]
    table = pa.table({"images": [[picture] for picture in pictures], "messages": [talk("What?", f"{number}") for number in range(3)]})
    pq.write_table(table, home / "rows.parquet")
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, COMMIT, json.dumps(GIVEN)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "datasets/owner___name/default/0.0.0" / COMMIT / "name-train.arrow", list(map(json.loads, done.stdout.splitlines()))


def test_offline_the_cache_is_read_and_nothing_else(offline):
    file, (whole, pinned, branch, *missing) = offline
    assert whole == pinned == [str(file)]
    assert f"revision main can't be checked; the cache holds commit {COMMIT}: write this as revision" in branch
    for said, name in zip(missing, ("owner/name/test", "owner/name/other/train", "owner/other/train"), strict=True):
        assert said.startswith(f"ConfigError: {name}: can't be loaded from the Hugging Face hub: ")
        assert "HF_HUB_OFFLINE is set" in said


def test_its_rows_are_a_source(offline, tmp_path, monkeypatch):
    file, _ = offline
    asked = []

    class Loaded:
        cache_files = ({"filename": str(file)},)

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return Loaded

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    annotation = {"hub": "owner/name", "subset": "charts", "revision": "main"}
    config = parse_config({"data": {"sources": {"s": {"annotation": annotation}}, "workers": 1}}, base=tmp_path)
    tokenizer = byte_tokenizer()
    facts = prepare(config, tokenizer).facts
    assert asked[0] == (("owner/name", "charts"), {"split": "train", "revision": "main"})
    assert facts.lists("image_width")[1].tolist() == [40, 41, 42]
    assert load_facts(config, tokenizer).table.equals(facts.table)
    assert [message["content"] for message in load_sample(facts.address(2)).messages] == ["What?", "2"]
    assert str(facts.sources[0].root) == "hf://datasets/owner/name@main"
    again = parse_config({"data": {"sources": {"s": {"annotation": [annotation, str(file)]}}}}, base=tmp_path)
    with pytest.raises(ConfigError, match="names a file twice"):
        prepare(again, tokenizer)


def test_what_the_hub_answers_is_said_without_the_request(monkeypatch):
    class Answer(Exception):
        response = type("Response", (), {"status_code": 401})

    def load_dataset(*_, **__):
        raise Answer("Authorization: Bearer hf_secret")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ConfigError, match=r"the server answers 401; for a private or gated dataset set HF_TOKEN") as caught:
        hub.files_of(HubDataset(hub="owner/name"))
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        ({"hub": "name"}, "annotation.dataset.hub: 'name' is not the name of a dataset, which has the form owner/name"),
        ({"hub": "owner/name", "splits": "train"}, "unknown key 'data.sources.s.annotation.dataset.splits'"),
        ({"hub": "owner/name", "split": "train[:100]"}, "annotation.dataset.split"),
        (3, "annotation.path: expected a path or an address"),
    ],
)
def test_names_are_checked(annotation, problem):
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"sources": {"s": {"annotation": annotation}}}})
    assert problem in str(caught.value)
