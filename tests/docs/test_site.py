"""The documentation builds without a warning and without the network, and the generated pages cover all keys and all verbs."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from eagle_train.config import Config, Source

ROOT = Path(__file__).parents[2]


def load_generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages():
    return load_generator().pages()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_builds_and_has_every_page(site):
    listed = re.findall(r":\s+([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    for page in listed:
        assert (site / ("index.html" if page == "index" else f"{page}/index.html")).is_file(), page


def test_site_loads_nothing_from_other_hosts(site):
    loads = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//[^\"]*\"|<link\b[^>]*\bhref=\"(?:https?:)?//[^\"]*\"")
    styles = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")
    for path in site.rglob("*.html"):
        assert not loads.search(path.read_text()), path
    for path in site.rglob("*.css"):
        assert not styles.search(path.read_text()), path


def keys_of(model: type[BaseModel], generator) -> set[tuple[str, ...]]:
    """Names of a section's keys and of those of the sections inside."""
    result = {(name,) for name in model.model_fields}
    for field in model.model_fields.values():
        for inner in generator._models(field.annotation):
            result |= keys_of(inner, generator)
    return result


def test_configuration_page_has_every_key(pages):
    generator = load_generator()
    page = pages[generator.CONFIGURATION]
    rows = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert {name for (name,) in keys_of(Config, generator)} - set(Config.model_fields) <= rows
    assert set(re.findall(r"^## `(\w+)`", page, flags=re.MULTILINE)) == set(Config.model_fields)
    assert set(Source.model_fields) <= rows


def test_configuration_page_shows_defaults_and_allowed_values(pages):
    page = pages[load_generator().CONFIGURATION]
    assert "| `placement` | one of `linspace`, `center` | `linspace` |" in page
    assert re.search(
        r"^\| `annotation` \| mapping or path or address or list of mapping or path or address \| required \|", page, flags=re.MULTILINE
    )
    assert "| `packs_per_step` | whole number, >= 1 | `32` |" in page
    free, fixed = (re.search(rf"^\| `{key}` \|.*$", page, flags=re.MULTILINE)[0] for key in ("log_every", "seed"))
    assert "*Free on resume.*" in free
    assert "*Free on resume.*" not in fixed


def test_command_page_has_every_verb(pages):
    generator = load_generator()
    page = pages[generator.COMMANDS]
    assert {"init", "prepare", "plan", "show", "train", "eval", "chat", "export", "report", "doctor", "lmdb build"} <= set(
        generator.verbs()
    )
    for verb in generator.verbs():
        assert f"## eagle {verb}\n" in page
        assert f"Usage: eagle {verb} " in page


def test_command_page_has_every_exit_code(pages):
    from eagle_train import errors

    generator = load_generator()
    named = {value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
    assert named | {0} == set(generator.exit_codes())
    for code in generator.exit_codes():
        assert f"\n| {code} | " in pages[generator.COMMANDS]


def test_names_on_the_architecture_page_exist():
    """Dotted names in code, for example eagle_train.data.sample.normalise, can be imported."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"`(eagle_\w+(?:\.\w+)+)`", page))
    assert len(names) > 8
    for name in sorted(names):
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name), name


def test_links_of_markdown_files_outside_the_site():
    """Relative links of README.md, CONTRIBUTING.md and examples/ lead to files; mkdocs checks those inside docs/."""
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "packages").glob("*/README.md"),
    ]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text()):
            if not link.startswith(("http://", "https://")):
                assert (path.parent / link).exists(), f"{path.relative_to(ROOT)}: {link}"
