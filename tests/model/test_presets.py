"""Presets by their sizes, without memory for their weights."""

import pytest
import torch

from eagle_model import EagleForConditionalGeneration, preset
from eagle_model.presets import PRESETS


def parameters(config):
    with torch.device("meta"):
        model = EagleForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_eight_billion():
    """Qwen2.5-7B has 7 615 616 512 parameters; SigLIP so400m without pooling head and the connector come on top."""
    config = preset("8b")
    width, mlp, layers = 1152, 4304, 27
    attention = 4 * (width * width + width)
    tower = layers * (attention + 2 * width * mlp + mlp + width + 4 * width) + 14 * 14 * 3 * width + width + 1024 * width + 2 * width
    connector = 2 * 4 * width + 4 * width * 3584 + 3584 + 3584 * 3584 + 3584
    assert parameters(config) == 7_615_616_512 + tower + connector
    assert config.tokens_per_tile == 256
    assert config.tile_size == 448
    assert (config.min_dynamic_tiles, config.max_dynamic_tiles, config.select_layer, config.use_thumbnail) == (1, 12, -1, True)


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 0.5e6, 1e6), ("1b", 0.8e9, 1.1e9), ("2b", 1.8e9, 2.4e9)])
def test_sizes(name, low, high):
    assert low < parameters(preset(name)) < high


def test_tokenizer_gives_ids_and_vocabulary(small_tokenizer, qwen_tokenizer):
    tiny = preset("tiny", tokenizer=small_tokenizer)
    assert tiny.text_config.vocab_size == len(small_tokenizer)
    assert tiny.image_token_index == small_tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    large = preset("8b", tokenizer=qwen_tokenizer)
    assert large.image_token_index == 151665
    assert large.text_config.vocab_size == 152064
    assert large.text_config.eos_token_id == 151645


def test_changes():
    config = preset("tiny", select_layer=-2, text_config={"num_hidden_layers": 7}, vision_config={"image_size": 32})
    assert config.select_layer == -2
    assert config.text_config.num_hidden_layers == 7
    assert config.text_config.hidden_size == PRESETS["tiny"]["text_config"]["hidden_size"]
    assert config.tile_size == 32
    for wrong, words in (
        ({"max_dynamic_tile": 3}, "max_dynamic_tile; did you mean max_dynamic_tiles"),
        ({"text_config": {"num_hidden_layer": 3}}, "text_config.num_hidden_layer; did you mean num_hidden_layers"),
        ({"vision_config": {"colour": 3}}, "vision_config.colour"),
    ):
        with pytest.raises(ValueError, match=words):
            preset("tiny", **wrong)
    with pytest.raises(ValueError, match="tiny, 1b, 2b, 8b"):
        preset("9b")
