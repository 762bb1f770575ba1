"""`eagle clean`: lists and removes facts and plans that no run needs; what any run needs stays."""

import json
import os
import shutil
import time

import pytest

from eagle_train.config import dump_config
from eagle_train.data.errors import PrepareError
from eagle_train.data.lock import locked
from eagle_train.data.prepare import load_facts
from eagle_train.runs.folder import claim_folder
from eagle_train.runs.leftovers import CleanError, leftovers, needed_by, remove
from eagle_train.runs.ready import get_ready


@pytest.fixture
def run(colour_run, tmp_path):
    """A prepared and planned run by its name, with the facts that all of these runs share."""

    def make(name="run", system=None, claimed=True, **sections):
        data = {"sources": {"rows": {"annotation": "rows.jsonl"}}, "workers": 1, "facts": "shared"}
        prompt = {} if system is None else {"prompt": {"system": system}}
        config = colour_run(rows=4, run={"name": name}, data=data, **prompt, **sections)
        ready = get_ready(config, held_out=False)
        for schedule in ready.schedules:
            schedule.plan(0)
        if claimed:
            claim_folder(config, ready.tokenizer)
        return config

    return make


def files(config):
    names = (path for path in config.facts_folder.rglob("*") if path.is_file())
    return {path for path in names if path.suffix not in (".lock", ".yaml") and path.name != ".lock"}


def found(config, **options):
    return {path for one in leftovers(config, days=options.pop("days", 0), **options) for path in one.files}


def test_all_that_a_run_made_is_needed(run):
    config = run()
    assert found(config) == set()
    needed = {path for path in needed_by(config).files if path.exists()}
    assert needed == files(config)
    assert {path.suffix for path in needed} >= {".parquet", ".arrow", ".plan", ".json", ".jsonl"}


def test_facts_of_a_run_that_is_gone_are_removed_and_only_these(run):
    kept = run("kept")
    before = files(kept)
    gone = run("gone", system="Another system prompt.")
    more = files(gone) - before
    assert found(kept) == found(gone) == set(), "both run folders exist"
    shutil.rmtree(gone.run.folder)
    listed = leftovers(kept, days=0)
    assert {path for one in listed for path in one.files} == more
    assert {one.what for one in listed} == {"facts of other settings", "tables", "plans"}
    size = sum(path.stat().st_size for path in more)
    assert remove(listed) == size
    assert files(kept) == before
    get_ready(kept, held_out=False)
    assert files(kept) == before, "nothing was made again"


def test_what_was_used_lately_stays(run):
    kept, gone = run("kept"), run("gone", system="Another system prompt.")
    shutil.rmtree(gone.run.folder)
    assert found(kept, days=1) == set()
    old = time.time() - 3 * 86400
    for path in found(kept):
        os.utime(path, (old, old))
    assert found(kept, days=2)
    assert found(kept, days=4) == set()
    part = next(path for path in found(kept) if path.suffix == ".parquet")
    os.utime(part, (time.time(), old))  # read
    assert part.parent not in {path.parent for path in found(kept, days=2)}


def test_a_prepared_run_that_was_not_trained_keeps_its_facts(run):
    """Its configuration is nowhere but in the record that it left with the facts."""
    kept, other = run("kept"), run("other", system="Another system prompt.", claimed=False)
    assert not (other.run.folder / "config.yaml").exists()
    assert other.run.folder.is_dir()
    assert found(kept) == set()


def test_a_run_folder_elsewhere_is_named(run, tmp_path):
    kept, other = run("kept"), run("other", system="Another system prompt.")
    shutil.copytree(other.run.folder, tmp_path / "elsewhere" / "other")
    shutil.rmtree(other.run.folder)
    assert found(kept)
    assert found(kept, runs=[tmp_path / "elsewhere" / "other"]) == set()


def test_rows_that_changed_leave_old_parts(run, tmp_path):
    config = run()
    before = files(config)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    row = json.loads(rows[0])
    row["conversations"][0]["value"] = "<image>which color is it?"
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row), *rows[1:]]) + "\n")
    assert not {path for path in found(config) if path.name.startswith("part-")}, "it is continued where it stopped"
    get_ready(config, held_out=False).schedules[0].plan(0)
    listed = found(config)
    assert {path.suffix for path in listed} == {".parquet", ".json", ".jsonl", ".arrow", ".plan"}
    assert listed < before
    remove(leftovers(config, days=0))
    assert len(load_facts(config, get_ready(config, held_out=False).tokenizer)) == len(rows)


def test_nothing_is_removed_when_a_run_cannot_be_told(run, tmp_path):
    kept, other = run("kept"), run("other", system="Another system prompt.")
    text = (other.run.folder / "config.yaml").read_text()
    (other.run.folder / "config.yaml").write_text(text.replace("rows.jsonl", "missing.jsonl"))
    record = next(path for path in (kept.facts_folder / "runs").glob("*.yaml") if "name: other" in path.read_text())
    record.unlink()
    with pytest.raises(CleanError, match=r"nothing is removed: what the run in .*other needs can't be told .*missing\.jsonl") as caught:
        leftovers(kept, days=0)
    assert f"remove that folder and {other.run.folder / 'config.yaml'}, if nobody needs the run" in str(caught.value)


def test_a_source_that_is_prepared_now_is_refused(run):
    kept, gone = run("kept"), run("gone", system="Another system prompt.")
    shutil.rmtree(gone.run.folder)
    listed = leftovers(kept, days=0)
    before = files(kept)
    with locked(listed[0].folder, lambda holder: AssertionError(holder)), pytest.raises(PrepareError, match="is being prepared by process"):
        remove(listed)
    assert files(kept) == before


def test_the_command_lists_and_removes_with_yes(run, tmp_path, eagle_here):
    kept, gone = run("kept"), run("gone", system="Another system prompt.")
    (tmp_path / "kept.yaml").write_text(dump_config(kept))
    before = files(kept)
    ended = eagle_here("clean", tmp_path / "kept.yaml", "--older-than", "0")
    assert ended.returncode == 0
    assert "every file is needed" in ended.stdout
    shutil.rmtree(gone.run.folder)
    ended = eagle_here("clean", tmp_path / "kept.yaml")
    assert "or was used in the last 7 days" in ended.stdout
    ended = eagle_here("clean", tmp_path / "kept.yaml", "--older-than", "0")
    assert "facts of other settings" in ended.stdout
    assert "nothing is removed; add --yes" in ended.stdout
    assert files(kept) == before
    ended = eagle_here("clean", tmp_path / "kept.yaml", "--older-than", "0", "--yes")
    assert ended.returncode == 0
    assert "removed 0." in ended.stdout
    assert files(kept) < before
    assert eagle_here("clean", tmp_path / "kept.yaml", "--run", tmp_path / "none").returncode == 2
