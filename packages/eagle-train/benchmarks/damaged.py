"""Prepare over damaged media: whether every row is good or in the ledger, and how fast.

    python packages/eagle-train/benchmarks/damaged.py [FILES] [--verify ends] [--out FILE.json]

Small images, videos and documents of 15 kinds with bytes flipped, overwritten, zeroed, cut off, missing or repeated; a tenth have the
name of another kind (`tests/support/damage.py`). Exits 1 when a row is neither good nor in the ledger.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the packages `benchmarks` and `tests` are
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_model.tokenizer import train_tokenizer
from eagle_train.config import parse_config
from eagle_train.data.prepare import prepare
from tests.support.damage import row_of, write_damaged

METRICS = {name: Metric("", "none") for name in ("files", "good", "ledger")} | {"files_per_s": Metric("files/s", "higher")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="?", type=int, default=10_000)
    parser.add_argument("--verify", choices=["header", "ends", "decode"], default="ends")
    add_out(parser)
    arguments = parser.parse_args()
    result = Result("eagle-train/damaged", environment(("av", "pillow", "pypdfium2")), METRICS, settings={"files": arguments.files})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps(row_of(path)) for path in write_damaged(folder / "media", arguments.files)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        data = {
            "sources": {"damaged": {"annotation": "rows.jsonl", "root": "media"}},
            "verify": arguments.verify,
            "limits": {"max_bad_fraction": 1.0},
        }
        config = parse_config({"run": {"name": "damaged", "dir": "runs"}, "data": data}, base=folder)
        done = prepare(config, train_tokenizer(["What is it? A square."], 300))
        ledger = [json.loads(line) for line in (folder / "runs/damaged/ledger.jsonl").read_text().splitlines()]
        lost = arguments.files - done.good_rows - len(ledger)
        speed = done.rows / done.seconds
        result.add(f"verify: {arguments.verify}", files=done.rows, good=done.good_rows, ledger=len(ledger), files_per_s=speed)
        report(result, arguments.out)
        print("reasons:", ", ".join(f"{reason} {count}" for reason, count in sorted(done.reasons.items())))
    return int(lost != 0)


if __name__ == "__main__":
    sys.exit(main())
