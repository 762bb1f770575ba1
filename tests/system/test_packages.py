"""Each package can be published by itself: version, licence, papers, and a stated range for every sibling that it needs."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tiling", "sampling", "kernels", "cp", "model", "train")


def project(name: str) -> dict:
    return tomllib.loads((ROOT / "packages" / f"eagle-{name}" / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", PACKAGES)
def test_version_in_code_changelog_and_metadata_agree(name):
    version = project(name)["version"]
    assert importlib.import_module(f"eagle_{name}").__version__ == version
    assert f"## {version}" in (ROOT / "packages" / f"eagle-{name}" / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", PACKAGES)
def test_papers_are_there(name):
    folder = ROOT / "packages" / f"eagle-{name}"
    assert project(name)["license"] == "Apache-2.0"
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (folder / "src" / f"eagle_{name}" / "py.typed").exists()
    assert len((folder / "README.md").read_text()) > 500


@pytest.mark.parametrize("name", PACKAGES)
def test_every_dependency_has_a_lower_bound_and_siblings_a_range(name):
    metadata = project(name)
    optional = [dependency for extra in metadata.get("optional-dependencies", {}).values() for dependency in extra]
    for dependency in metadata["dependencies"] + optional:
        assert ">=" in dependency, f"{dependency} has no lower bound"
        if dependency.startswith("eagle-"):
            assert re.search(r">=[\d.]+,<[\d.]+", dependency), f"{dependency} states no range"


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_exist(name):
    package = importlib.import_module(f"eagle_{name}")
    for public in package.__all__:
        assert getattr(package, public) is not None
