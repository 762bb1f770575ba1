"""The decoder against transformers' own models with the same weights, and packing against one sequence at a time."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from eagle_cp import Layout
from eagle_model.language.attention import AttentionInputs
from eagle_model.language.decoder import LanguageModel

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-tied-yarn": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "qwen3-bias": lambda: Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=8, sliding_window=None),
    "llama3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "smollm2": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LINEAR, num_key_value_heads_=1),
    "smollm3": lambda: SmolLM3Config(**(SIZES | {"num_hidden_layers": 4}), pad_token_id=None, tie_word_embeddings=True),
    "smollm3-yarn": lambda: SmolLM3Config(**SIZES, pad_token_id=None, no_rope_layers=[0, 1], mlp_bias=True, rope_parameters=YARN),
    "one-kv-head": lambda: LlamaConfig(**(SIZES | {"num_key_value_heads": 1})),
}


def theirs_and_ours(config):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too, so that none is left out unnoticed
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    ours = LanguageModel(config)
    if config.tie_word_embeddings:
        ours.lm_head.weight = ours.model.embed_tokens.weight
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def run(model, ids, layout, positions):
    context = AttentionInputs(positions, model.model.inv_freq(ids.device), layout)
    return model.lm_head(model.model(model.model.embed_tokens(ids), context))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name):
    theirs, ours = theirs_and_ours(CONFIGS[name]())
    ids = torch.randint(0, 60, (37,))
    expected = theirs(ids[None]).logits[0]
    got = run(ours, ids, Layout.single([0, 37]), torch.arange(37))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    gradients = dict(theirs.named_parameters())
    for parameter, tensor in ours.named_parameters():
        reference = gradients[parameter].grad
        torch.testing.assert_close(tensor.grad, reference, atol=1e-5 * reference.abs().max().item() + 1e-6, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "smollm3"])
def test_packed_equals_one_by_one(name):
    _, model = theirs_and_ours(CONFIGS[name]())
    lengths = [1, 9, 30, 4]
    starts = [0, 1, 10, 40, 44]
    ids = torch.randint(0, 60, (44,))
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = run(model, ids, Layout.single(starts), positions)
    weight = torch.randn_like(packed)
    (packed * weight).sum().backward()
    together = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    for first, last, length in zip(starts, starts[1:], lengths):
        alone = run(model, ids[first:last], Layout.single([0, length]), torch.arange(length))
        torch.testing.assert_close(packed[first:last], alone, atol=1e-5, rtol=1e-5)
        (alone * weight[first:last]).sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(together[key], parameter.grad, atol=1e-5 * parameter.grad.abs().max().item(), rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["smollm3", "smollm3-yarn"])
def test_equals_transformers_in_float64(name):
    """Which layers are rotated, and what YaRN scales, to a precision where a wrong layer can't hide; frequencies are float32 in both."""
    theirs, ours = (model.double() for model in theirs_and_ours(CONFIGS[name]()))
    ids = torch.randint(0, 60, (50,))
    got = run(ours, ids, Layout.single([0, 50]), torch.arange(50))
    torch.testing.assert_close(got, theirs(ids[None]).logits[0], atol=2e-6, rtol=1e-6)


def test_layers_without_rotation_do_not_see_positions():
    """With every layer of that kind, equal embeddings give the same output wherever they stand; with one rotated layer they do not."""
    for pattern, equal in (([0, 0], True), ([0, 1], False)):
        _, model = theirs_and_ours(SmolLM3Config(**SIZES, pad_token_id=None, no_rope_layers=pattern))
        ids = torch.randint(0, 60, (12,))
        near, far = (run(model, ids, Layout.single([0, 12]), torch.arange(12) * step) for step in (1, 7))
        assert torch.equal(near, far) == equal


def test_frequencies_stay_float32():
    _, model = theirs_and_ours(CONFIGS["llama"]())
    model.to(torch.bfloat16)
    assert model.model.inv_freq(torch.device("cpu")).dtype == torch.float32
    assert not list(model.buffers())
    with torch.inference_mode():
        assert not model.model.inv_freq(torch.device("meta")).is_inference(), "it would spoil the next training step"
    with torch.device("meta"):
        built = LanguageModel(LlamaConfig(**SIZES))
    assert built.model.frequencies.device.type == "cpu"
