"""Prepare over damaged media: no crash, no hang, every row good or in the ledger. `benchmarks/damaged.py` does it with 10 000 files."""

import json
import time

from eagle_train.data.prepare import prepare
from tests.support.damage import row_of, write_damaged

COUNT = 200


def test_every_damaged_file_is_good_or_in_the_ledger(tmp_path, monkeypatch, make_config, tokenizer, write_jsonl):
    monkeypatch.chdir(tmp_path)
    paths = write_damaged(tmp_path / "media", COUNT)
    write_jsonl(tmp_path / "rows.jsonl", [row_of(path) for path in paths])
    used = {}
    for level in ("header", "decode"):
        config = make_config(
            {"s": {"annotation": "rows.jsonl", "root": "media"}},
            data={"verify": level, "facts": f"facts-{level}", "limits": {"max_bad_fraction": 1.0}},
        )
        began = time.monotonic()
        report = prepare(config, tokenizer)
        assert time.monotonic() - began < 120
        ledger = [json.loads(line) for line in (tmp_path / "runs/test/ledger.jsonl").read_text().splitlines()]
        assert report.rows == report.good_rows + len(ledger) == COUNT
        assert all(entry["reason"] for entry in ledger)
        used[level] = report.good_rows
    assert 0 < used["decode"] <= used["header"] < COUNT
