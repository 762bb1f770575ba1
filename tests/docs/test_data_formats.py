"""docs/data-formats.md: every row that it shows is accepted or refused as it says."""

import re
import textwrap
from pathlib import Path

import pytest
import yaml

from eagle_train.config import parse_config
from eagle_train.curate.settings import load_curation
from eagle_train.data.recipe import parse_recipe
from eagle_train.data.sample import RowError, Sample, normalise, parse_row

PAGE = Path(__file__).parents[2] / "docs" / "data-formats.md"
BLOCK = re.compile(r"^<!-- (rows|refused): (.*?) -->\n```json\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks(kind: str) -> list[tuple[str, str]]:
    """(what the comment says, one row) for every line of every block of that kind."""
    return [(said, line) for found, said, text in BLOCK.findall(PAGE.read_text()) if found == kind for line in text.splitlines()]


def sample_of(line: str) -> Sample:
    return normalise(parse_row(line.encode()), "mine", root="/data", line=1)


@pytest.mark.parametrize(("said", "line"), blocks("rows"))
def test_accepted(said, line):
    expected = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", said)}
    sample = sample_of(line)
    assert {"images": len(sample.images), "videos": len(sample.videos), "turns": len(sample.messages)} == expected


@pytest.mark.parametrize(("reason", "line"), blocks("refused"))
def test_refused(reason, line):
    with pytest.raises(RowError) as error:
        sample_of(line)
    assert error.value.reason == reason


def test_every_block_of_rows_is_tested():
    text = PAGE.read_text()
    assert text.count("```json") == len(BLOCK.findall(text)) + 1  # the first one is the page's introduction and is shown again below
    first = re.search(r"^```json\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1].strip()
    assert first in [line for _, line in blocks("rows")]


def test_clip_borders():
    [(_, line)] = [row for row in blocks("rows") if '"start": 12.5, "end": 40' in row[1]]
    [video] = sample_of(line).videos
    assert (video.path, video.start, video.end) == ("/data/talk.mp4", 12.5, 40.0)


def yaml_blocks() -> list[tuple[str, str]]:
    """(page, text) of the YAML blocks of all pages."""
    pattern = re.compile(r"^( *)```yaml\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
    return [
        (path.name, textwrap.dedent(text)) for path in sorted(PAGE.parent.glob("*.md")) for _, text in pattern.findall(path.read_text())
    ]


@pytest.mark.parametrize(("page", "text"), yaml_blocks())
def test_yaml_blocks_are_configurations_or_recipes(page, text, tmp_path):
    content = yaml.safe_load(text)
    if "videos" in content and "folder" in content:  # of eagle curate
        path = tmp_path / page
        path.write_text(text)
        assert load_curation(path).folder.name == Path(content["folder"]).name
    elif set(content) == {"sources"}:
        recipe = parse_recipe(content["sources"], base=tmp_path, origin=page)
        assert set(recipe.sources) == set(content["sources"])
    else:
        config = parse_config(content, base=tmp_path, origin=page)
        assert config.run.name == content.get("run", {}).get("name", config.run.name)


def test_there_are_yaml_blocks():
    pages = {"curate.md", "data-formats.md", "evaluation.md", "getting-started.md", "remote-data.md", "weights.md"}
    assert {page for page, _ in yaml_blocks()} == pages
