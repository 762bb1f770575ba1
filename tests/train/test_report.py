"""The plot of a run is drawn from its metrics alone."""

import subprocess
import sys

import pytest
from PIL import Image

from eagle_train.config import dump_config
from eagle_train.training.metrics import Metrics
from eagle_train.watching.report import summary, write_report


def fill(path):
    metrics = Metrics(path / "metrics.jsonl")
    for step in range(1, 21, 3):  # every third is logged
        stage, base = ("a", 0) if step <= 10 else ("b", 10)
        metrics.write(
            {"kind": "step", "stage": stage, "step": step - base, "steps": 10, "total_step": step, "loss": 2.0 / step, "lr": 1e-3}
            | {"tokens_per_second": 100.0, "seconds": 0.1, "missing": 0, "seen_missing": (step > 2) + (step > 14), "seen_tokens": step * 10}
        )
    scores = {"held": {"questions": 50, "accuracy": 0.8, "text_only": 0.5}}
    metrics.write({"kind": "eval", "stage": "b", "total_step": 20, "scores": scores, "accuracy": 0.8})


def test_plot_and_summary(tmp_path):
    fill(tmp_path)
    with Image.open(write_report(tmp_path)) as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50
    text = summary(tmp_path)
    assert "stage a: step 10 of 10, loss 2.000 -> 0.200, 100 tok/s, 1 sample missing" in text
    assert "stage b: step 9 of 10, loss 0.154 -> 0.105, 100 tok/s, 1 sample missing" in text
    assert "held: 0.800 right of 50 questions at step 20, 0.500 text-only" in text


def test_losses_of_sources_and_mfu_are_in_plot_and_summary(tmp_path):
    fill(tmp_path)
    plain = write_report(tmp_path).read_bytes()
    metrics = Metrics(tmp_path / "metrics.jsonl")
    records = list(metrics)
    metrics.path.unlink()
    for record in records:
        losses = {"charts": 4.0 / record["total_step"], "talks": 1.0} if record["total_step"] > 3 else {"charts": 4.0}
        metrics.write(record | ({"losses": losses, "mfu": 0.4} if record["kind"] == "step" else {}))
    assert write_report(tmp_path).read_bytes() != plain
    lines = summary(tmp_path).splitlines()
    assert lines[0] == "stage a: step 10 of 10, loss 2.000 -> 0.200, 100 tok/s, MFU 40.0%, 1 sample missing"
    assert lines[1:3] == ["  charts: loss 4.000 -> 0.400", "  talks: loss 1.000 -> 1.000"]


def test_without_steps_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="no steps yet"):
        write_report(tmp_path)


REPORT_WITHOUT_TORCH = """
import sys
from eagle_train.cli.main import main
try:
    main(["report", sys.argv[1]])
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules
"""


def test_report_never_imports_torch(tmp_path, make_config):
    config = make_config({"s": {"annotation": "rows.jsonl"}})
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "config.yaml").write_text(dump_config(config))
    fill(config.run.folder)
    command = [sys.executable, "-c", REPORT_WITHOUT_TORCH, config.run.folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "stage b: step 9 of 10" in done.stdout
    assert (config.run.folder / "plot.png").exists()
