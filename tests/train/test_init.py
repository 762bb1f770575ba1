"""`eagle init`: every key with its default and its allowed values, and an example that trains."""

import re

import yaml

from eagle_train.config import load_config


def test_init_writes_a_configuration_with_every_default(tmp_path, eagle_here):
    done = eagle_here("init", tmp_path / "eagle.yaml")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "eagle.yaml").read_text()
    config = load_config(tmp_path / "eagle.yaml")
    assert [stage.max_tokens for stage in config.stages] == [32768, 65536, 131072]
    # With every comment that shows a default made real, it is the same configuration.
    real = re.sub(r"^( *)# ([a-z_]+:( |$))", r"\1\2", text, flags=re.MULTILINE)
    real = re.sub(r"^ *(?:sources|eval_sources|eval_recipe|path|epochs|steps|recipe): .*\n", "", real, flags=re.MULTILINE)
    (tmp_path / "real.yaml").write_text(real)
    assert yaml.safe_load(real)["stages"][0]["lr"] == 2e-05
    everything = load_config(tmp_path / "real.yaml")
    assert everything.stages == config.stages
    assert everything.checkpoint == config.checkpoint
    done = eagle_here("init", tmp_path / "eagle.yaml")
    assert done.returncode == 2
    assert "--force" in done.stderr


def test_init_lists_allowed_values(tmp_path, eagle_here):
    eagle_here("init", tmp_path / "eagle.yaml")
    text = (tmp_path / "eagle.yaml").read_text()
    listed = re.findall(r"## (each )?one of: (.*)\n *#? ?([a-z_]+): (.*)", text)
    assert {key for _, _, key, _ in listed} >= {
        "activations",
        "strategy",
        "placement",
        "schedule",
        "loss_weighting",
        "dtype",
        "preset",
        "train",
    }
    for each, names, key, value in listed:
        chosen = yaml.safe_load(value)
        assert set(chosen if each else [chosen]) <= set(names.split(", ")), key
    assert "## one of: linspace, center\n  # placement: linspace" in text
    assert "## keys: vision, connector, language\n    # parts: {}" in text


def test_init_example_is_a_run_that_trains(tmp_path, eagle_here):
    made = eagle_here("init", "--example", tmp_path / "example")
    assert made.returncode == 0, made.stderr
    config = tmp_path / "example" / "run.yaml"
    assert f"eagle train {config}" in made.stdout
    assert eagle_here("plan", config).returncode == 0
    shown = eagle_here("show", config, "--row", "shapes:1")
    assert shown.returncode == 0, shown.stderr
    done = eagle_here("train", config, "--device", "cpu", "--nproc", 1, "--set", "stages.0.steps=2")
    assert done.returncode == 0, done.stderr
    assert "48 rows: 48 planned" in done.stdout
    assert re.search(r"^held_out +8 ", done.stdout, flags=re.MULTILINE)
    refused = eagle_here("init", "--example", tmp_path / "example")
    assert refused.returncode == 2
    assert "add --force" in refused.stderr
