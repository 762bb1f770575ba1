"""The configuration: closed, overridable, explained, and wrong keys get the nearest right one."""

import json

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from eagle_train.config import Config, ConfigError, StageConfig, dump_config, explain_defaults, load_config, parse_config


def test_defaults_are_the_known_settings():
    config = Config()
    assert [(stage.name, stage.max_tokens) for stage in config.stages] == [("32k", 32768), ("64k", 65536), ("128k", 131072)]
    stage = config.stages[0]
    assert (stage.lr, stage.weight_decay, stage.warmup_ratio, stage.schedule) == (2e-5, 0.05, 0.03, "cosine")
    assert (stage.loss_weighting, stage.train) == ("sqrt", ["vision", "connector", "language"])
    assert (config.sampling.strategy, config.sampling.fps, config.sampling.min_frames) == ("ads", 2.0, 8)
    assert (config.tiling.max_tiles, config.tiling.thumbnail, config.parallel.dtype) == (12, True, "auto")


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("modle.path=x", "did you mean 'model'?"),
        ("run.nmae=x", "did you mean 'name'?"),
        ("parallel.gather=2", "did you mean 'all_gather'?"),
        ("data.limits.max_bad_row=1", "did you mean 'max_bad_rows'?"),
        ("stages.32k.max_token=1", "'stages.0.max_token'; did you mean 'max_tokens'?"),
        ("stages.0.maxTokens=1", "did you mean 'max_tokens'?"),
        ("sampling.zzz=1", "known here: fps, max_frames, min_frames, placement, strategy"),
    ],
)
def test_unknown_keys_name_the_nearest(key, right):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [key])
    assert right in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stages": [{"name": "a"}]}, "stages.0.max_tokens is missing"),
        ({"stages": []}, "stages: list should have at least 1 item"),
        ({"stages": [{"name": "a", "max_tokens": 8}, {"name": "a", "max_tokens": 8}]}, "stages share a name: a"),
        ({"stages": [{"name": "a", "max_tokens": 8, "epochs": 1, "steps": 1}]}, "keep one"),
        ({"stages": [{"name": "a", "max_tokens": "many"}]}, "'many' is not a number of tokens"),
        ({"stages": [{"name": "a", "max_tokens": 8, "sources": {"x": 0}}]}, "weight of source 'x' is 0"),
        ({"stages": [{"name": "a", "max_tokens": 8, "betas": [0.9, 1.5]}]}, "must lie in [0, 1)"),
        ({"model": {"preset": "tiny", "path": "x"}}, "model: preset (tiny) and path"),
        ({"data": {"recipe": "a", "sources": {"s": {"annotation": "b"}}}}, "both say what to read; keep one"),
        ({"tiling": {"min_tiles": 5, "max_tiles": 4}}, "max_tiles (4) is below min_tiles (5)"),
        ({"sampling": {"max_frames": 4}}, "lower min_frames too"),
        ({"sampling": {"strategy": "adz"}}, "sampling.strategy: no strategy is called 'adz'; registered are ads, ads-fill, uniform"),
        ({"run": {"name": "a/b"}}, "run.name"),
        ({"run": {"name": ".."}}, "run.name: string should match"),
        ({"stages": [{"name": ".hidden", "max_tokens": 8}]}, "stages.0.name: string should match"),
        ({"stages": [{"name": "a", "max_tokens": 8, "epochs": float("inf")}]}, "stages.0.epochs: input should be a finite number"),
        ({"data": {"sources": {"s": {"annotation": "a", "repeat_time": float("inf")}}}}, "repeat_time: input should be a finite number"),
        ({"stages": [{"name": "a", "max_tokens": 8, "sources": {"x": float("nan")}}]}, "finite number"),
        ({"data": {"limits": {"max_bytes": "1e999"}}}, "data.limits.max_bytes: '1e999' is not a number of bytes"),
        ({"data": {"limits": {"max_pixels": 178_956_971}}}, "max_pixels: input should be less than or equal to 178956970"),
        ({"run": 5}, "run:"),
        ({"loader": {"prefetch": "2 lumps"}}, "one with a unit of: b, kb, mb"),
    ],
)
def test_wrong_values_say_where_and_what(content, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(content, origin="run.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("run.yaml: ")


def test_all_errors_come_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config({"runn": 1, "sampling": {"fps": -1}, "tiling": {"tiles": 3}})
    assert len(str(caught.value).splitlines()) == 3


def test_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("stages:\n- {name: a, max_tokens: 1K}\n- {name: b, max_tokens: 2048}\n")
    config = load_config(
        path, ["stages.b.lr=1e-4", "stages.0.train=[connector]", "loader.prefetch=512MiB", "data.limits.max_bad_rows=null", "run.seed=3"]
    )
    assert (config.stages[1].lr, config.stages[0].train, config.stages[0].max_tokens) == (1e-4, ["connector"], 1024)
    assert (config.loader.prefetch, config.run.seed) == (2**29, 3)
    assert load_config(None, ["stages.64k.steps=5"]).stages[1].steps == 5
    for wrong, message in (
        ("stages.c.lr=1", "2 items named a, b, none is 'c'"),
        ("stages.7.lr=1", "none is '7'"),
        ("lr", "expected key=value"),
        ("run.name.x=1", "has no key 'x'"),
        ("run.name=[", "not valid YAML"),
        ("run.name=2024-02-31", "day"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, ["run.name=n", wrong])
        assert message in str(caught.value)


def test_paths_start_from_the_file(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep/config.yaml"
    path.write_text("model: {path: weights}\ndata: {sources: {s: {annotation: rows.jsonl, root: ../media}}}\nrun: {dir: out}\n")
    monkeypatch.chdir(tmp_path)
    config = load_config("deep/config.yaml")
    assert config.data.sources["s"].annotation == tmp_path / "deep/rows.jsonl"
    assert config.data.sources["s"].root == tmp_path / "deep/../media"
    assert config.run.folder == tmp_path / "deep/out/eagle"
    assert config.facts_folder == tmp_path / "deep/out/eagle/facts"
    assert config.model.path == str(tmp_path / "deep/weights")


def test_unreadable_files_say_where(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder, not a file; give a YAML file"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"is a folder, not a file; that of the run in it is .*config.yaml"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"nothing.yaml: can't be read"):
        load_config(tmp_path / "nothing.yaml")
    path = tmp_path / "config.yaml"
    for text, message in (
        ("run: {name: a\nmodel: {}", "config.yaml:2:"),
        ("run: {name: a, name: b}", "'name' is written twice"),
        ("- a", "holds a list"),
        ("run: {name: 2024-02-31}", r"config.yaml: not valid YAML: day"),
        ("run: {[a]: b}", "config.yaml:1:7: not valid YAML: key"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    path.write_text("")
    assert load_config(path).run.name == "eagle"


def test_a_dumped_configuration_loads_to_the_same(tmp_path):
    config = load_config(None, ["data.sources={s: {annotation: rows.jsonl}}", "stages.32k.epochs=2"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config


PARTS = ("vision", "connector", "language")


@given(
    st.none() | st.lists(st.sampled_from(PARTS), min_size=1, unique=True),
    st.dictionaries(
        st.sampled_from(PARTS),
        st.fixed_dictionaries({}, optional={"train": st.sampled_from(["full", "lora", "frozen"]), "lr": st.just(1e-3)}),
    ),
)
def test_what_a_stage_may_say_of_its_parts_can_be_said_again_with_every_default(train, parts):
    """A run writes its configuration with all defaults, and every later command reads that file."""
    stage = {"name": "one", "max_tokens": 1024, "parts": parts} | ({} if train is None else {"train": train})
    try:
        config = parse_config({"stages": [stage]})
    except ConfigError:
        assume(False)
    again = parse_config(yaml.safe_load(dump_config(config)))
    assert again == config
    assert again.stages[0].modes == config.stages[0].modes


def test_every_chosen_value_is_explained():
    config = load_config(None, ["stages=[{name: a, max_tokens: 8}]", "sampling.fps=1", "data.sources={s: {annotation: x}}"])
    chosen = {default.path: default for default in explain_defaults(config)}
    assert "sampling.fps" not in chosen
    assert "stages.0.max_tokens" not in chosen
    assert chosen["stages.0.lr"].value == 2e-5
    assert chosen["data.sources.s.repeat_time"].value == 1.0
    assert chosen["sampling.min_frames"].description.startswith("N_min")
    assert all(default.description for default in chosen.values())
    assert "stages.1" in {default.path for default in explain_defaults(Config())}


def test_schema_describes_every_field():
    schema = Config.json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    for model in (schema, *schema["$defs"].values()):
        for name, field in model["properties"].items():
            assert field.get("description"), name


def test_sections_stay_checked_when_assigned():
    stage = StageConfig(name="a", max_tokens=8)
    with pytest.raises(ValueError, match="lr"):
        stage.lr = -1.0
