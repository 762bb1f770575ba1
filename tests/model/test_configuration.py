"""Configuration files: as released checkpoints spell them, and as other loaders need them."""

import json

import pytest
from transformers import AutoConfig, Qwen2Config, SiglipVisionConfig

from eagle_model import EagleConfig, register
from eagle_model.configuration import legacy_rope

VISION = {"model_type": "siglip_vision_model", "hidden_size": 24, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
TEXT = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}


def read(folder, **content):
    """A configuration from a file with just this content."""
    (folder / "config.json").write_text(json.dumps({"model_type": "eagle_2_5_vl", **content}))
    register()
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, EagleConfig)
    return config


@pytest.mark.parametrize("name", ["text_config", "llm_config"])
def test_language_part_has_two_names(tmp_path, name):
    config = read(tmp_path, vision_config=VISION, **{name: TEXT})
    assert config.text_config.model_type == "qwen2"
    assert config.text_config.hidden_size == 32
    assert config.text_config.rope_parameters["rope_theta"] == 1000000.0
    assert config.text_config.sliding_window is None
    assert "llm_config" not in config.to_dict()


@pytest.mark.parametrize(("named", "kind"), [("Qwen2ForCausalLM", "qwen2"), ("Qwen3ForCausalLM", "qwen3"), ("LlamaForCausalLM", "llama")])
def test_language_class_is_named_by_architectures(tmp_path, named, kind):
    config = read(tmp_path, vision_config=VISION, text_config=TEXT | {"architectures": [named], "model_type": "whatever"})
    assert config.text_config.model_type == kind
    by_type = EagleConfig(text_config={key: value for key, value in TEXT.items() if key != "architectures"} | {"model_type": kind})
    assert by_type.text_config.architectures == [named]


def test_absent_fields_are_the_files_defaults(tmp_path):
    config = read(tmp_path, vision_config=VISION, text_config=TEXT)
    assert config.select_layer == -4
    assert config.downsample_ratio == 0.5
    assert config.use_pixel_shuffle
    assert config.mlp_connector_layers == 2
    assert config.force_image_size is None
    assert config.tile_size == 56
    assert config.tokens_per_tile == 4
    assert (config.min_dynamic_tiles, config.max_dynamic_tiles) == (1, 6)
    assert not config.use_thumbnail
    assert config.vision_config.num_hidden_layers == 12
    assert config.vision_config.vision_use_head is False


@pytest.mark.parametrize(
    ("top", "inside", "tied"),
    [
        (None, None, False),
        (True, None, True),
        (False, None, False),
        (None, True, True),
        (None, False, False),
        (True, False, False),
        (False, True, True),
    ],
)
def test_tying_may_be_said_in_two_places(tmp_path, top, inside, tied):
    content = {} if top is None else {"tie_word_embeddings": top}
    text = TEXT if inside is None else TEXT | {"tie_word_embeddings": inside}
    config = read(tmp_path, vision_config=VISION, text_config=text, **content)
    assert config.tie_word_embeddings is tied
    assert config.text_config.tie_word_embeddings is tied


def test_both_spellings_of_the_grid(tmp_path):
    config = read(tmp_path, vision_config=VISION, text_config=TEXT, min_dynamic_patch=2, max_dynamic_patch=9)
    assert (config.min_dynamic_tiles, config.max_dynamic_tiles) == (2, 9)
    both = read(tmp_path, vision_config=VISION, text_config=TEXT, max_dynamic_tiles=12, max_dynamic_patch=9)
    assert both.max_dynamic_tiles == 12
    edited = read(
        tmp_path, vision_config=VISION, text_config=TEXT, min_dynamic_tiles=1, max_dynamic_tiles=6, min_dynamic_patch=2, max_dynamic_patch=9
    )
    assert (edited.min_dynamic_tiles, edited.max_dynamic_tiles) == (1, 6), "the defaults, but given"
    written = config.to_diff_dict()
    assert [written[f"{end}_dynamic_{word}"] for end in ("min", "max") for word in ("tiles", "patch")] == [2, 2, 9, 9]


def test_written_file(tmp_path, make_config):
    config = make_config(image_token_index=100, text_config={"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "eagle_2_5_vl"
    assert written["architectures"] == ["Eagle2_5_VLForConditionalGeneration"]
    assert written["vision_config"]["model_type"] == "siglip_vision_model"
    assert written["vision_config"]["vision_use_head"] is False
    assert written["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert written["text_config"]["model_type"] == "qwen2"
    assert written["text_config"]["rope_theta"] == 5e4
    assert written["text_config"]["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    for name in ("select_layer", "force_image_size", "downsample_ratio", "use_pixel_shuffle", "mlp_connector_layers", "dynamic_image_size"):
        assert name in written, name
    for name in ("use_thumbnail", "image_token_index", "tie_word_embeddings", "template", "loss_version"):
        assert name in written, name
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()


def test_objects_as_parts():
    config = EagleConfig(vision_config=SiglipVisionConfig(image_size=28, patch_size=14), text_config=Qwen2Config(tie_word_embeddings=True))
    assert config.tie_word_embeddings
    assert config.text_config.architectures == ["Qwen2ForCausalLM"]
    assert config.image_token_id is None
    config.image_token_id = 7
    assert config.image_token_index == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": {"architectures": ["Phi3ForCausalLM"]}}, "Phi3ForCausalLM"),
        ({"text_config": {"model_type": "gpt2"}}, "gpt2"),
        ({"vision_config": {"model_type": "intern_vit_6b"}}, "intern_vit_6b"),
        ({"vision_config": Qwen2Config()}, "Qwen2Config"),
        ({"text_config": SiglipVisionConfig()}, "SiglipVisionConfig"),
    ],
)
def test_unknown_parts_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        EagleConfig(**changes)


def test_legacy_rope_of_the_default():
    assert legacy_rope({"rope_type": "default", "rope_theta": 1e4}) == {"rope_theta": 1e4}
