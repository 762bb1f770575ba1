"""Two processes that prepare in one folder: the second one is refused, changes nothing, and finds everything later."""

import json
import pickle
import subprocess
import sys

import pytest

from eagle_train.data.prepare import PrepareError, prepare

PREPARES = """
import pickle, sys, time
from pathlib import Path
from eagle_train.config import parse_config
from eagle_train.data.prepare import prepare

def slow(step):
    print(step.rows_done, flush=True)
    sys.stdin.readline()  # go on when the test says so

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tokenizer = pickle.loads((folder / "tokenizer.pickle").read_bytes())
    data = {"sources": {"s": {"annotation": "rows.jsonl"}}, "workers": 1, "shard_rows": 10, "limits": {"max_bad_fraction": 1}}
    config = parse_config({"run": {"name": "test"}, "data": data}, base=folder)
    report = prepare(config, tokenizer, progress=slow)
    print("done", report.good_rows, report.bad_rows, flush=True)
"""


@pytest.fixture
def started(tmp_path, tokenizer, row, write_jsonl):
    """Another process that measured the first of four shards, and a folder with 30 good rows and 10 bad ones."""
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(tokenizer))
    (tmp_path / "other.py").write_text(PREPARES)
    rows = [row(f"Question {number}") if number % 4 else b"{" for number in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "other.py", tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "10\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def go_on(process):
    process.stdin.write("\n" * 10)
    process.stdin.flush()


def test_the_second_process_is_refused_and_harms_nothing(tmp_path, started, make_config, tokenizer):
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 10, "limits": {"max_bad_fraction": 1}})
    folder = next((tmp_path / "runs/test/facts").glob("s-*"))
    # What the other process is writing just now.
    being_written = folder / "part-0.parquet.host.1.tmp"
    being_written.write_bytes(b"half")
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(PrepareError, match=rf"is being prepared by process {started.pid} on .*: wait for it, and run again"):
        prepare(config, tokenizer)
    with pytest.raises(PrepareError, match="is being prepared"):
        prepare(config, tokenizer, again=True)
    assert {path.name for path in folder.iterdir()} == before
    assert not (tmp_path / "runs/test/ledger.jsonl").exists()
    go_on(started)
    assert started.stdout.read().splitlines()[-1] == "done 30 10"
    ledger = (tmp_path / "runs/test/ledger.jsonl").read_bytes()
    assert [json.loads(line)["line"] for line in ledger.splitlines()] == list(range(1, 41, 4))
    report = prepare(config, tokenizer)
    assert (report.good_rows, report.bad_rows, report.rows_reused) == (30, 10, 40)
    assert (tmp_path / "runs/test/ledger.jsonl").read_bytes() == ledger


def test_a_killed_process_holds_nothing(tmp_path, started, make_config, tokenizer):
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 10, "limits": {"max_bad_fraction": 1}})
    leftover = next((tmp_path / "runs/test/facts").glob("s-*")) / "part-0.parquet.host.1.tmp"
    leftover.write_bytes(b"half")
    started.kill()
    started.wait()
    report = prepare(config, tokenizer)
    assert (report.good_rows, report.bad_rows, report.rows_reused, leftover.exists()) == (30, 10, 10, False)
