"""Processes that prepare rows: when they start, how many, and what is left of them after kill -9."""

import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from eagle_train.data.prepare import prepare
from eagle_train.data.sources.index import index_file
from tests.support.waiting import alive, wait_for

KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from eagle_train.config import parse_config
from eagle_train.data import prepare as module

def die(step):
    if step.rows_done >= 300:
        print(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tokenizer = pickle.loads((folder / "tokenizer.pickle").read_bytes())
    data = {"sources": {"s": {"annotation": "rows.jsonl"}}, "workers": 2, "shard_rows": 50}
    config = parse_config({"run": {"name": "test"}, "data": data}, base=folder)
    module.prepare(config, tokenizer, progress=die)
"""


def test_kill_nine_loses_at_most_a_shard_a_worker(tmp_path, row, make_config, write_jsonl, tokenizer):
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(tokenizer))
    (tmp_path / "killed.py").write_text(KILLED)
    count = 12_000
    write_jsonl(tmp_path / "rows.jsonl", [row(f"Question {index}") for index in range(count)])
    killed = subprocess.run([sys.executable, tmp_path / "killed.py", tmp_path], stdout=subprocess.PIPE, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    children = [int(pid) for pid in killed.stdout.split()]
    assert len(children) >= 2
    wait_for(lambda: not any(map(alive, children)), seconds=20)  # workers do not outlive a killed parent
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 50})
    folder = next(path for path in (tmp_path / "runs/test/facts").iterdir() if path.name.startswith("s-"))
    shards = index_file(str(tmp_path / "rows.jsonl"), 50, tmp_path / "cache").shards
    missing = next(name for shard in shards if not (folder / (name := f"part-{shard.digest}.parquet")).exists())
    (folder / f"{missing}.99999.tmp").write_bytes(b"half a file")
    report = prepare(config, tokenizer)
    assert 300 <= report.rows_reused < count
    assert report.facts.column("line").tolist() == list(range(1, count + 1))
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("patience", [0.05, 100.0])
def test_processes_start_when_the_work_is_long(tmp_path, row, make_config, write_jsonl, tokenizer, monkeypatch, patience):
    from eagle_train.data import prepare as module

    rows = [row(f"Question {index}") for index in range(1500)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    started = []
    monkeypatch.setattr(module, "POOL_PAYS_AFTER", patience)
    monkeypatch.setattr(module, "map_items", lambda function, items, **options: iter(started.extend(items) or ()))
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 50, "workers": None})
    if patience > 1:
        assert prepare(config, tokenizer).good_rows == 1500
        assert not started
    else:
        with pytest.raises(RuntimeError, match="not the 1500 lines"):  # what the processes would have done is missing, and noticed
            prepare(config, tokenizer)
        assert 0 < len(started) < 30


@pytest.mark.parametrize(("seconds", "cores", "processes"), [(0.11, 64, 3), (0.2, 2, 2), (0.2, 64, 5), (0.1, 64, 0), (0.2, 1, 1)])
def test_processes_start_early_when_much_is_left(
    tmp_path, row, make_config, write_jsonl, tokenizer, monkeypatch, seconds, cores, processes
):
    """As the first rows say; not after the time in which it might have been done, and not on all cores of a large machine."""
    from eagle_train.data import prepare as module

    write_jsonl(tmp_path / "rows.jsonl", [row(f"Question {index}") for index in range(100)])
    started, clock = [], [0.0]

    def pool(function, items, *, workers, **options):
        started.append(workers if items else 0)
        return ((item, function(item)) for item in items)

    class Slow(module.Measuring):
        def __call__(self, work):
            clock[0] += seconds
            return super().__call__(work)

    monkeypatch.setattr(module, "map_items", pool)
    monkeypatch.setattr(module, "cpus", lambda: cores)
    monkeypatch.setattr(module, "Measuring", Slow)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 2, "workers": None})
    assert prepare(config, tokenizer).good_rows == 100
    assert started == [processes]
