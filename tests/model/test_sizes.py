"""Sizes that are read without torch equal those of the configuration classes."""

import subprocess
import sys
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_model.configuration import EagleConfig
from eagle_model.presets import IN_USE, PRESETS
from eagle_model.sizes import stated_sizes

NAMES = ("tile_size", "tokens_per_tile")


@settings(deadline=None, max_examples=50)
@given(
    preset=st.sampled_from(sorted(PRESETS)),
    side=st.sampled_from([None, 224, 448, 896]),
    change=st.dictionaries(st.sampled_from(["downsample_ratio", "use_pixel_shuffle"]), st.sampled_from([True, False, 0.5, 1.0])),
    positions=st.integers(1, 1 << 20),
)
def test_stated_sizes_are_those_of_the_configuration(preset, side, change, positions):
    if isinstance(change.get("downsample_ratio"), bool):
        del change["downsample_ratio"]
    if not isinstance(change.get("use_pixel_shuffle", True), bool):
        del change["use_pixel_shuffle"]
    values = IN_USE | deepcopy(PRESETS[preset]) | {"force_image_size": side} | change
    values["text_config"]["max_position_embeddings"] = positions
    config, sizes = EagleConfig(**deepcopy(values)), stated_sizes(values)
    for name in NAMES:
        assert getattr(sizes, name) == getattr(config, name)
    assert sizes.text_config.max_position_embeddings == config.text_config.max_position_embeddings
    saved = stated_sizes(config.to_diff_dict())
    assert [getattr(saved, name) for name in NAMES] == [getattr(config, name) for name in NAMES]


@pytest.mark.parametrize(
    ("part", "key"), [("vision_config", "image_size"), ("vision_config", "patch_size"), ("text_config", "max_position_embeddings")]
)
def test_a_size_that_is_not_written_is_not_guessed(part, key):
    values = deepcopy(PRESETS["8b"])
    del values[part][key]
    assert stated_sizes(values) is None
    assert stated_sizes({}) is None


def test_presets_and_sizes_are_read_without_torch():
    code = "import sys; import eagle_model.presets, eagle_model.sizes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
