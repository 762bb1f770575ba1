"""`eagle doctor`: what runs on this machine, and versions outside of the tested range."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from eagle_train.cli import doctor
from eagle_train.cli.tested import TESTED


def test_doctor_names_what_runs(eagle_here):
    done = eagle_here("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("torch", "attention on", "rms_norm", "h264", "memory", "CPUs"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("name", "version", "advice"),
    [
        ("transformers", "5.24.3", ""),
        ("transformers", "5.17.0", ""),
        ("torch", "2.15.0+cu132", ""),
        (
            "transformers",
            "5.25.0.dev0",
            "newer than 5.24.0, the newest tested release: if something fails, pip install 'transformers<=5.24.0'",
        ),
        ("transformers", "6.0", "newer than 5.24.0"),
        ("transformers", "5.16.9", "older than 5.17.0, the oldest tested release: pip install --upgrade 'transformers>=5.17.0'"),
        ("torch", "2.9.1+cpu", "older than 2.11.0"),
        ("eagle-train", "0.1.0", ""),
    ],
)
def test_doctor_warns_of_versions_that_are_not_tested(monkeypatch, name, version, advice):
    monkeypatch.setattr(doctor, "TESTED", TESTED | {"transformers": ("5.17.0", "5.24.0"), "torch": ("2.11.0", "2.15.0")})
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    found = doctor._version(name)
    assert found.value == version
    assert found.remedy.startswith(advice)
    assert bool(found.remedy) == bool(advice)
    assert not found.serious


def test_tested_ranges_start_where_ci_tests_the_oldest_releases():
    lines = (Path(__file__).parents[2] / ".ci" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: oldest for name, (oldest, _) in TESTED.items()} == {name: pinned[name] for name in TESTED}
    for name, (oldest, newest) in TESTED.items():
        assert not doctor.untested(name, oldest)
        assert not doctor.untested(name, newest)


def test_every_extra_has_its_command_in_doctor(monkeypatch):
    """A new extra is named here too, and a command here names an extra that exists."""

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    named = set()
    for name, what in doctor.OPTIONAL.items():
        found = doctor._optional(name, what)
        assert found.value == f"not installed (optional; {what})"
        [command] = re.findall(r"pip install (?:'([\w-]+)\[([\w-]+)\]'|([\w-]+))$", what)
        named.add(command[:2])
    extras = {}
    for path in (Path(__file__).parents[2] / "packages").glob("*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        extras[project["name"]] = project.get("optional-dependencies", {})
    for package, extra in named - {("", "")}:
        assert extra in extras[package], (package, extra)
    assert {extra for package, extra in named if package == "eagle-train"} == set(extras["eagle-train"])
