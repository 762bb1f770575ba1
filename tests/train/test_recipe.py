"""Recipes: ours and the originals', every key read or refused."""

import json
import tarfile

import pytest

from eagle_train.config import ConfigError, parse_config
from eagle_train.data.recipe import load_recipe, recipe_of


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    return tmp_path


def test_yaml(rows):
    path = rows / "recipe.yaml"
    text = "a: {annotation: a.jsonl, root: media, repeat_time: 0.5, weight: 2, max_dynamic_tiles: 4}\nb: {annotation: b.jsonl}\n"
    path.write_text(text)
    recipe = load_recipe(path)
    assert list(recipe.sources) == ["a", "b"]
    a, b = recipe.sources.values()
    assert (a.annotation, a.root, a.repeat_time, a.weight, a.max_dynamic_tiles) == (rows / "a.jsonl", rows / "media", 0.5, 2.0, 4)
    assert (b.root, b.repeat_time, b.weight, b.max_dynamic_tiles) == (None, 1.0, 1.0, None)
    path.write_text("sources:\n" + "".join(f"  {line}\n" for line in text.splitlines()))
    assert load_recipe(path) == recipe


def test_the_originals_json_loads_unchanged(rows):
    """The shape of the originals' recipes: names with root, annotation, repeat_time, length, and what their tools left in."""
    path = rows / "recipe.json"
    entry = {
        "root": "",
        "annotation": "a.jsonl",
        "repeat_time": 1,
        "length": 12,
        "modility": ["image"],
        "data_augment": False,
        "max_dynamic_tiles": 6,
    }
    path.write_text(json.dumps({"a": entry, "b": {"root": "media/", "annotation": "b.jsonl", "max_dynamic_patch": 1}}, indent="\t"))
    recipe = load_recipe(path)
    assert recipe.lengths == {"a": 12}
    assert recipe.sources["a"].max_dynamic_tiles == 6
    assert recipe.sources["b"].max_dynamic_tiles == 1
    assert recipe.notes == (f"{path}: a: modility = ['image'] is left aside: kinds of media are read from the rows",)


def test_relative_to_the_working_directory_where_only_there_is_something(rows, monkeypatch):
    (rows / "recipes").mkdir()
    path = rows / "recipes/recipe.json"
    path.write_text(json.dumps({"a": {"annotation": "a.jsonl", "root": "."}}))
    monkeypatch.chdir(rows)
    assert load_recipe("recipes/recipe.json").sources["a"].annotation == rows / "a.jsonl"
    (rows / "recipes/a.jsonl").write_text("{}")
    assert load_recipe("recipes/recipe.json").sources["a"].annotation == rows / "recipes/a.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": {"anotation": "a.jsonl"}}', r"unknown key 'anotation'; did you mean 'annotation'\?"),
        ('{"a": {"annotation": "a.jsonl", "maxDynamicTiles": 2}}', "did you mean 'max_dynamic_tiles'"),
        ('{"a": {"annotation": "a.jsonl", "repeat_time": 0}}', "a: repeat_time: input should be greater than 0"),
        ('{"a": {"annotation": "a.jsonl", "data_augment": true}}', "augmented pixels"),
        ('{"a": {"annotation": "a.jsonl", "max_dynamic_patch": 2, "max_dynamic_tiles": 2}}', "keep one"),
        ('{"a": {"annotation": "a.jsonl"}, "a": {"annotation": "b.jsonl"}}', "'a' is written twice"),
        ('{"a": "a.jsonl"}', "a: is 'a.jsonl', expected a mapping"),
        ("{}", "holds no sources"),
        ("[1]", "holds no sources"),
        ('{"a": ', r"recipe.json:1:7: not valid JSON"),
        ('{"sources": {"a": {"annotation": "a.jsonl"}}, "surces": {}}', "did you mean 'sources'"),
    ],
)
def test_mistakes_are_named(rows, content, message):
    path = rows / "recipe.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_recipe_of_a_run(rows):
    inline = {"a": {"annotation": "a.jsonl"}}
    config = parse_config({"data": {"sources": inline, "eval_sources": {"b": {"annotation": "b.jsonl"}}}}, base=rows)
    assert list(recipe_of(config).sources) == ["a"]
    assert list(recipe_of(config, evaluation=True).sources) == ["b"]
    for content, message in (
        ({}, "nothing to train on"),
        ({"data": {"sources": {"a": {"annotation": "none.jsonl"}}}}, r"source a: annotation file .*none.jsonl does not exist"),
        (
            {"data": {"sources": inline}, "stages": [{"name": "s", "max_tokens": 8, "sources": {"b": 1}}]},
            r"stages.0.sources: no source is called 'b'; known here: a",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe_of(parse_config(content, base=rows))


def test_a_root_that_is_not_a_folder_of_media(rows):
    """Images inside of an LMDB or a tar file are named by the rows; a path below such a file would be missing in every row."""
    (rows / "images.lmdb").mkdir()
    (rows / "images.lmdb" / "data.mdb").write_bytes(b"")
    with tarfile.open(rows / "images.tar", "w") as tar:
        tar.add(rows / "a.jsonl", "a.jsonl")
    for name, key in (("images.lmdb", "lmdb_key"), ("images.tar", "member")):
        config = parse_config({"data": {"sources": {"a": {"annotation": "a.jsonl", "root": name}}}}, base=rows)
        with pytest.raises(ConfigError, match=rf'source a: root .*{name} is not a folder of media; .*"{key}": "1.jpg"'):
            recipe_of(config)
