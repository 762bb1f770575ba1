"""Prepare on a Ray cluster of two nodes: the facts and the ledger of local processes, also when a node dies midway, and resume."""

import json
import os
import time

import pytest

pytest.importorskip("ray")

import ray

from eagle_train.config import ConfigError, parse_config
from eagle_train.data import prepare as module
from eagle_train.data.prepare import PrepareError, prepare
from eagle_train.executors import WorkerError, map_items
from tests.support.damage import row_of, write_damaged
from tests.support.models import small_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """Configurations over 400 damaged and whole files in shards of 5 rows, each with a folder for its facts."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [json.dumps(row_of(path)) for path in write_damaged(folder / "media", 400)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")

    def make(name):
        data = {
            "sources": {"s": {"annotation": "rows.jsonl", "root": "media"}},
            "facts": f"facts-{name}",
            "shard_rows": 5,
            "limits": {"max_bad_fraction": 1.0},
        }
        return parse_config({"run": {"name": name, "dir": "runs"}, "data": data}, base=folder)

    return make


def ledger_of(config):
    return (config.run.folder / "ledger.jsonl").read_bytes()


def test_a_node_that_dies_changes_no_fact_and_no_ledger(configured, cluster):
    found, second = cluster
    here, there, tokenizer = configured("here"), configured("there"), small_tokenizer(320)
    local = prepare(here, tokenizer)
    steps = []

    def progress(step):
        steps.append(step.rows_done)
        if len(steps) == 5:  # of 80 shards
            found.remove_node(second, allow_graceful=False)

    report = prepare(there, tokenizer, executor="ray", progress=progress)
    deadline = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert (report.good_rows, report.bad_rows, report.reasons) == (local.good_rows, local.bad_rows, local.reasons)
    assert (report.facts.content, report.facts.key) == (local.facts.content, local.facts.key)
    assert report.facts.table.equals(local.facts.table)
    assert ledger_of(there) == ledger_of(here)
    again = prepare(there, tokenizer, executor="ray")
    assert again.rows_reused == 400


def test_ray_continues_what_was_stopped_and_local_processes_what_ray_left(configured, cluster):
    tokenizer, config = small_tokenizer(320), configured("stopped")

    class Stopped(Exception):
        pass

    def stop_at(rows):
        def progress(step):
            if step.rows_done - step.rows_reused >= rows:
                raise Stopped

        return progress

    def parts():
        return {path: path.stat().st_mtime_ns for path in config.facts_folder.rglob("part-*.parquet")}

    with pytest.raises(Stopped):
        prepare(config, tokenizer, executor="ray", progress=stop_at(100))
    by_ray = parts()
    assert 100 // 5 <= len(by_ray) < 400 // 5
    with pytest.raises(Stopped):  # rows with damaged media are looked at again, which the report does not count as reused
        prepare(config, tokenizer, progress=stop_at(200))
    by_both = parts()
    assert len(by_both) > len(by_ray)
    report = prepare(config, tokenizer, executor="ray")
    after = parts()
    assert after.keys() >= by_both.keys() >= by_ray.keys()
    # A task that was running when it was stopped may still have written its part.
    assert len(by_both.items() - after.items()) <= 4
    whole = prepare(configured("whole"), tokenizer)
    assert report.facts.table.equals(whole.facts.table)
    assert ledger_of(config) == ledger_of(configured("whole"))


def fails(item):
    raise PrepareError(f"item {item} can't be done")


def dies(item):
    os._exit(1)


def test_errors_of_the_function_and_of_its_process_arrive(cluster):
    with pytest.raises(PrepareError, match="item 3 can't be done"):
        list(map_items(fails, [3], executor="ray"))
    with pytest.raises(WorkerError, match=r"while it read one of: row 3.*Ray ran it 6 times; find it"):
        list(map_items(dies, [3], executor="ray", name=lambda item: f"row {item}", advice="find it"))


def test_parts_on_another_disk_are_refused(configured, cluster, monkeypatch):
    monkeypatch.setattr(module, "_ARRIVES_WITHIN", 1.0)
    config = configured("elsewhere")
    listdir = module.os.listdir
    monkeypatch.setattr(module.os, "listdir", lambda path: [name for name in listdir(path) if not name.endswith(".parquet")])
    with pytest.raises(PrepareError, match="a node of the cluster wrote it, and it is not here"):
        prepare(config, small_tokenizer(320), executor="ray")


def test_a_cluster_without_cpus_is_refused():
    ray.init(address="local", num_cpus=0, log_to_driver=False)
    try:
        begin = time.monotonic()
        with pytest.raises(ConfigError, match="no node of the cluster has a CPU"):
            list(map_items(fails, [1], executor="ray"))
        assert time.monotonic() - begin < 20
    finally:
        ray.shutdown()
