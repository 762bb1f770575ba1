"""Sizes for memory planning are those of the model that is built."""

import pytest
import torch

from eagle_model import EagleForConditionalGeneration, preset
from eagle_model.memory import decoder_shape, vision_shape


@pytest.mark.parametrize("name", ["tiny", "1b", "2b", "8b"])
def test_shapes_have_the_parameters_of_the_parts(name):
    config = preset(name)
    with torch.device("meta"):
        parts = EagleForConditionalGeneration(config).parts()
    counts = {part: sum(parameter.numel() for parameter in module.parameters()) for part, module in parts.items()}
    decoder, vision = decoder_shape(config), vision_shape(config, 1024)
    # QK-norm and biases are left out of the plan: at most 0.1 % of a decoder.
    assert decoder.parameters == pytest.approx(counts["language"], rel=1e-3)
    assert vision.parameters == counts["vision"]
    assert vision.connector_parameters(decoder.hidden) == counts["connector"]


def test_shapes_of_the_released_size():
    config = preset("8b")
    vision = vision_shape(config, 32768)
    assert (vision.patches, vision.merge, vision.positions, vision.patch_values) == (128 * 1024, 4, 1024, 588)
    decoder = decoder_shape(config)
    # 8B model, counted on the meta device
    assert decoder.parameters == 7_615_616_512
    assert vision.parameters == 413_327_088
    assert vision.connector_parameters(decoder.hidden) == 29_376_512
    assert not vision.frozen
    assert vision_shape(config, 100, frozen=True).frozen
