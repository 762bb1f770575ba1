"""compare: factors in the right direction, and the exit code."""

import math
from pathlib import Path

import pytest

from benchmarks.compare import changes, main
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, ResultError, write

METRICS = {"ms": Metric("ms", "lower"), "rate": Metric("rows/s", "higher"), "kept": Metric("", "none")}


def result(ms: float = 2.0, rate: float = 100.0, rival: float = 5.0, benchmark: str = "eagle-x/speed", **more) -> Result:
    made = Result(benchmark, environment([]), dict(METRICS), ceilings={"copy": 1.0}, **more)
    made.add("a", ms=ms, rate=rate, kept=7)
    made.add("a", "rival", ms=rival)
    return made


@pytest.fixture
def compare(tmp_path, capsys):
    def run(old: Result, new: Result, *options: str) -> tuple[int, str]:
        write(old, tmp_path / "old.json")
        write(new, tmp_path / "new.json")
        code = main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_factors_above_one_are_worse_in_both_directions():
    found = {(row.contender, row.metric): row.factor for row in changes(result(), result(ms=3.0, rate=50.0, rival=4.0))}
    assert found == {("ours", "ms"): 1.5, ("ours", "rate"): 2.0, ("rival", "ms"): 0.8}


@pytest.mark.parametrize(
    ("old", "new", "factor"),
    [
        (result(ms=0.0), result(ms=0.0), 1.0),
        (result(ms=0.0), result(ms=1.0), math.inf),
        (result(rate=5.0), result(rate=0.0), math.inf),
        (result(ms=1.0), result(ms=0.0), 0.0),
    ],
)
def test_zeros(old, new, factor):
    assert factor in {row.factor for row in changes(old, new)}


@pytest.mark.parametrize(
    ("new", "options", "code"),
    [
        (result(), [], 0),
        (result(ms=2.09), [], 0),
        (result(ms=2.11), [], 1),
        (result(ms=2.11), ["--threshold", "1.06"], 0),
        (result(rate=90.0), [], 1),
        (result(rate=90.0), ["--metric", "ms"], 0),
        (result(ms=1.0, rate=1000.0), [], 0),
        (result(rival=50.0), [], 0),
        (result(rival=50.0), ["--contender", "ours", "rival"], 1),
    ],
)
def test_exit_code(compare, new, options, code):
    assert compare(result(), new, *options)[0] == code


def test_variants_of_a_contender_decide_too(compare):
    old, new = result(), result()
    for made, ms in ((old, 1.0), (new, 2.0)):
        made.add("a", "ours, out=", ms=ms)
        made.add("a", "oursish", ms=ms)
    code, text = compare(old, new)
    assert code == 1
    assert "| a | ours, out= | ms | 1 | 2 | 2.000 | worse |" in text
    assert "| a | oursish | ms | 1 | 2 | 2.000 |  |" in text
    assert compare(old, new, "--contender", "rival")[0] == 0


def test_worse_and_missing_figures_are_named(compare):
    new = result(ms=9.0)
    del new.cases[0].metrics["rate"]
    new.add("b", ms=1.0)
    code, text = compare(result(), new)
    assert code == 1
    assert "| a | ours | ms | 2 | 9 | 4.500 | worse |" in text
    assert "| a | ours | rate | 100 |  |  | missing |" in text
    assert "Only in NEW: b (ours)" in text
    assert "2 of 3 figures missing or worse than 1.05 (ours)" in text


@pytest.mark.parametrize(
    ("new", "options", "says"),
    [
        (result(benchmark="eagle-y/speed"), [], "OLD is a result of eagle-x/speed and NEW of eagle-y/speed"),
        (result(), ["--metric", "kept"], "metric 'kept' cannot be compared; OLD has ms, rate"),
        (result(), ["--contender", "nobody"], "OLD has no figures of nobody"),
    ],
)
def test_results_that_cannot_be_compared(compare, new, options, says):
    code, text = compare(result(), new, *options)
    assert code == 2
    assert says in text


def test_opposite_directions_are_an_error():
    new = result()
    new.metrics["ms"] = Metric("ms", "higher")
    with pytest.raises(ResultError, match="better is lower in OLD and higher in NEW"):
        changes(result(), new)


def test_files_that_are_no_results(tmp_path, capsys):
    old = Path(__file__).parents[2] / "packages" / "eagle-kernels" / "benchmarks" / "results" / "operators-2026-11-22.json"
    assert main([str(old), str(old)]) == 2
    assert "have no schema and cannot be compared" in capsys.readouterr().err
    for threshold in ("0", "nan", "inf"):
        with pytest.raises(SystemExit):
            main([str(old), str(old), "--threshold", threshold])
