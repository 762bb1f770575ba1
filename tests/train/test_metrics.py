"""Metrics survive a cut line, a resume, and numbers that JSON hasn't got."""

import json

from eagle_train.training.metrics import Metrics, duration, progress_line, same_run

STEP = {
    "kind": "step",
    "stage": "a",
    "step": 1,
    "steps": 9,
    "loss": 1.5,
    "lr": 1e-3,
    "tokens_per_second": 1234.5678,
    "tiles_per_second": 5.0,
    "data_wait": 0.01,
    "seconds": 0.5,
    "eta": 125.0,
    "total_step": 1,
}


def test_lines_come_back_and_a_cut_line_is_left_out(tmp_path):
    metrics = Metrics(tmp_path / "run" / "metrics.jsonl")
    metrics.write(STEP)
    metrics.write(STEP | {"total_step": 2, "loss": float("nan")})
    with open(metrics.path, "a") as file:
        file.write('{"kind": "st')
    records = list(metrics)
    assert [record["total_step"] for record in records] == [1, 2]
    assert records[0]["tokens_per_second"] == 1234.568
    assert records[1]["loss"] == "nan"
    for line in metrics.path.read_text().splitlines()[:2]:
        json.loads(line, parse_constant=lambda name: 1 / 0)


def test_rewind_forgets_what_came_after(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.rewind(3)
    for step in range(1, 6):
        metrics.write(STEP | {"total_step": step})
    metrics.rewind(3)
    metrics.write(STEP | {"total_step": 4})
    assert [record["total_step"] for record in metrics] == [1, 2, 3, 4]


def test_a_record_is_replaced_where_it_says_the_same(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for accuracy in (0.5, 0.6):
        metrics.write(STEP | {"total_step": 9})
        metrics.replace({"kind": "final", "total_step": 9, "accuracy": accuracy})
    assert [record.get("accuracy") for record in metrics] == [None, None, 0.6]


def test_same_run_leaves_out_the_machine():
    [kept] = same_run([STEP])
    assert "loss" in kept
    assert not {"seconds", "eta", "tokens_per_second"} & set(kept)


def test_progress_line_has_loss_speed_memory_and_time_left():
    line = progress_line(STEP)
    assert "MFU" not in line  # not known on a CPU
    used = progress_line(STEP | {"mfu": 0.4321, "memory": 3 << 30, "memory_peak": 9 << 29})
    assert "1,235 tok/s  MFU 43.2%  memory 3.0 (peak 4.5) GiB  data wait 1.0%  left 2:05" in used
    assert "1/9" in line
    assert "1.5000" in line
    assert "1,235 tok/s" in line
    assert "2:05" in line


def test_durations():
    assert [duration(seconds) for seconds in (3.4, 61, 3723)] == ["3 s", "1:01", "1:02:03"]
