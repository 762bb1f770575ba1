"""plot: a picture of a result, and errors for what cannot be plotted."""

import pytest

from benchmarks.environment import environment
from benchmarks.plot import main
from benchmarks.results import Metric, Result, write


@pytest.fixture
def path(tmp_path):
    result = Result("eagle-x/speed", environment([]), {"ms": Metric("ms", "lower"), "rate": Metric("", "higher")})
    result.add("a", ms=1.0)
    result.add("a", "rival", ms=2.0)
    result.add("b", ms=3.0)
    write(result, tmp_path / "a.json")
    return tmp_path / "a.json"


def test_a_picture_is_written(path, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([str(path), "ms"]) == 0
    assert main([str(path), "ms", "--out", str(tmp_path / "other.png")]) == 0
    for name in ("a.png", "other.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_plotted(path, tmp_path, capsys):
    assert main([str(path), "rate"]) == 2
    assert "has no figures of 'rate'; it has ms, rate" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json"), "ms"]) == 2
    assert "none.json" in capsys.readouterr().err
