"""The result format: what is written is read back, and everything else is refused with the place."""

import json

import pytest

from benchmarks.environment import Environment, environment
from benchmarks.results import Case, Metric, Result, ResultError, read, report, validate, write
from benchmarks.rivals import Absent
from benchmarks.tables import document, number


def example() -> Result:
    result = Result(
        benchmark="eagle-x/speed",
        environment=environment(["numpy", "not-a-package"]),
        metrics={"ms": Metric("ms", "lower"), "rate": Metric("rows/s", "higher"), "kept": Metric("", "none")},
        ceilings={"copy_tb_per_s": 4.25},
        settings={"rows": 100, "fast": False, "names": ["a"]},
    )
    result.add("small", ms=1.5, kept=1)
    result.add("small", "rival", ms=3, details={"note": "first", "all": [1, 2]})
    result.add("large", rate=123456.0)
    result.absent.append(Absent("large", "rival", "ModuleNotFoundError: no module"))
    return result


def test_written_results_are_read_back(tmp_path):
    write(example(), tmp_path / "a.json")
    assert read(tmp_path / "a.json") == example()
    assert example().cases[0] == Case("small", "ours", {"ms": 1.5, "kept": 1.0})


def test_the_environment_names_versions_and_missing_packages():
    found = example().environment
    assert found.versions["numpy"]
    assert found.versions["not-a-package"] is None
    assert found.cores >= 1
    assert "numpy" in str(found)
    assert "not-a-package" not in str(found)


def test_a_gpu_is_named_with_its_number():
    assert "2 x Card" in str(Environment("2026-11-27T00:00:00Z", "3.11", "x86_64", 4, 0.0, gpu="Card", gpus=2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.add("small", ms=2.0), "case 'small', contender 'ours': occurs twice"),
        (lambda r: r.add("new"), "has no metrics"),
        (lambda r: r.add("new", seconds=1.0), "metric 'seconds' is not declared; declared are ms, rate, kept"),
        (lambda r: r.add("new", ms=float("nan")), "ms is nan, expected a finite number"),
        (lambda r: r.add("new", ms=float("inf")), "ms is inf"),
    ],
)
def test_contradictions_are_refused(tmp_path, change, says):
    result = example()
    change(result)
    with pytest.raises(ResultError, match=says):
        validate(result)
    with pytest.raises(ResultError, match=says):
        write(result, tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema is 2, expected 1"),
        ({"schema": None}, "schema is None"),
        ({"benchmark": 3}, "benchmark: found 3, expected str"),
        ({"surprise": 1}, "top level: found .*surprise"),
        ({"cases": {}}, r"cases: found \{\}"),
        ({"cases": [{"case": "a", "contender": "ours"}]}, r"cases\[0\]: found"),
        ({"cases": [{"case": "a", "contender": "ours", "metrics": {"ms": "1"}}]}, r"cases\[0\]\.metrics\.ms: found '1', expected float"),
        ({"cases": [{"case": "a", "contender": "ours", "metrics": {"ms": True}}]}, r"cases\[0\]\.metrics\.ms: found True"),
        (
            {"metrics": {"ms": {"unit": "ms", "better": "less"}}},
            r"metrics\.ms\.better: found 'less', expected \('lower', 'higher', 'none'\)",
        ),
        ({"environment": {"date": "2026"}}, "environment: found .*'date'.*expected the entries date, python"),
        ({"ceilings": {"copy": None}}, r"ceilings\.copy: found None"),
    ],
)
def test_other_files_are_refused_with_the_place(tmp_path, change, says):
    write(example(), tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text()) | change
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(ResultError, match=says) as caught:
        read(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"date": "2026-11-22", "rows": []}'])
def test_files_of_other_formats_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ResultError, match=r"a\.json"):
        read(tmp_path / "a.json")
    with pytest.raises(ResultError, match=r"none\.json"):
        read(tmp_path / "none.json")


def test_the_table_has_every_figure_and_what_was_absent(tmp_path, capsys):
    report(example(), tmp_path / "a.json")
    text = capsys.readouterr().out
    assert text.strip() == document(example()).strip() == (tmp_path / "a.md").read_text().strip()
    assert "| case | contender | ms | rate, rows/s | kept |" in text
    assert "| small | ours | 1.5 |  | 1 |" in text
    assert "| large | ours |  | 123,456 |  |" in text
    assert "- large, rival: ModuleNotFoundError: no module" in text
    assert read(tmp_path / "a.json") == example()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (0.11312, "0.1131"), (999.96, "1000"), (-2.5, "-2.5"), (1234567.0, "1,234,567"), (1.5e-6, "1.500e-06")],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text
