"""The table of decoder traits: what a configuration describes is built, and what no decoder of this package does is refused by name."""

import pytest
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from eagle_model import EagleConfig
from eagle_model.configuration import LANGUAGE_MODELS
from eagle_model.language.decoder import LanguageModel
from eagle_model.language.rope import inverse_frequencies
from eagle_model.language.spec import FAMILIES, UNSUPPORTED, decoder_spec

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "traits"),
    [
        (Qwen2Config(**SIZES), {"qkv_bias"}),
        (Qwen3Config(**SIZES), {"qk_norm"}),
        (Qwen3Config(**SIZES, attention_bias=True), {"qk_norm", "qkv_bias", "out_bias"}),
        (LlamaConfig(**SIZES), set()),
        (LlamaConfig(**SIZES, attention_bias=True), {"qkv_bias", "out_bias"}),
        (LlamaConfig(**SIZES, mlp_bias=True), {"mlp_bias"}),
        (MistralConfig(**SIZES, sliding_window=None), set()),
        (SmolLM3Config(**SIZES, attention_bias=True), {"qkv_bias", "out_bias"}),
    ],
)
def test_traits(config, traits):
    spec = decoder_spec(config)
    assert {name for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm") if getattr(spec, name)} == traits
    assert (spec.heads, spec.kv_heads, spec.layers, spec.norm_eps) == (4, 2, 2, config.rms_norm_eps)
    assert spec.head_dim == (config.head_dim if getattr(config, "head_dim", None) else 8)


def test_the_table_is_what_configurations_accept():
    assert list(LANGUAGE_MODELS.values()) == list(FAMILIES)
    for architecture, model_type in LANGUAGE_MODELS.items():
        assert EagleConfig(text_config={"architectures": [architecture], "sliding_window": None}).text_config.model_type == model_type


def test_layers_without_rotation():
    assert decoder_spec(LlamaConfig(**SIZES)).rotated == (True, True)
    eight = SmolLM3Config(**(SIZES | {"num_hidden_layers": 8}))
    assert decoder_spec(eight).rotated == (True, True, True, False) * 2
    longer = SmolLM3Config(**SIZES, no_rope_layers=[0, 1, 0, 1])
    assert decoder_spec(longer).rotated == (False, True)
    with pytest.raises(ValueError, match=r"text_config\.no_rope_layers is for 1 layers; the model has 2"):
        decoder_spec(SmolLM3Config(**SIZES, no_rope_layers=[1], layer_types=["full_attention"] * 2))
    with pytest.raises(ValueError, match=r"layer_types has full_attention, sliding_attention"):
        decoder_spec(SmolLM3Config(**SIZES, no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=16))


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        (GemmaConfig(**SIZES), ["multiply by 1 + weight", "GELU gate"]),
        (Gemma2Config(**SIZES), ["norms after attention and MLP", "attention windows", "soft caps"]),
        (Gemma3TextConfig(**SIZES), ["norms after attention and MLP", "attention windows"]),
        (Gemma3Config(), ["attention windows"]),
    ],
)
def test_gemma_is_refused_with_what_is_missing_and_what_to_take(config, lacks):
    """From a configuration object, a decoder's alone, and the content of a config.json."""
    for build in (decoder_spec, lambda config: EagleConfig(text_config=config), lambda config: EagleConfig(text_config=config.to_dict())):
        with pytest.raises(ValueError, match=r"is not supported: the decoder does not implement its") as caught:
            build(config)
        for words in (*lacks, "supported are Qwen2ForCausalLM", "SmolLM3ForCausalLM", "for example HuggingFaceTB/SmolLM3-3B"):
            assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has chunked_attention"),
        ({"sliding_window": 16}, "sliding_window is 16"),
        *(({name: 7}, f"{name} is 7") for name in UNSUPPORTED),
    ],
)
def test_unsupported_traits_are_refused(changes, words):
    config = LlamaConfig(**SIZES)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"text_config\.{words}"):
        LanguageModel(config)


@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_traits_survive_the_file(architecture, tmp_path):
    """A configuration that is written and read describes the same decoder."""
    config = EagleConfig(text_config=SIZES | {"architectures": [architecture], "sliding_window": None})
    config.save_pretrained(tmp_path)
    assert decoder_spec(EagleConfig.from_pretrained(tmp_path).text_config) == decoder_spec(config.text_config)


def test_the_default_window_of_mistral_is_refused():
    with pytest.raises(ValueError, match=r"text_config\.sliding_window is 4096"):
        decoder_spec(MistralConfig(**SIZES))


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}]
)
def test_unsupported_rope_is_refused(rope):
    config = LlamaConfig(**SIZES)
    config.rope_parameters = rope
    with pytest.raises(ValueError, match="text_config"):
        inverse_frequencies(config)


def test_sliding_window():
    text = SIZES | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "use_sliding_window": False}
    LanguageModel(EagleConfig(text_config=text).text_config)
    used = EagleConfig(text_config=text | {"use_sliding_window": True, "max_window_layers": 1}).text_config
    with pytest.raises(ValueError, match="sliding_attention"):
        LanguageModel(used)
