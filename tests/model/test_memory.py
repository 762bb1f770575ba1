"""Sizes for memory planning are those of the model that is built."""

import pytest
import torch

from eagle_kernels import Training, plan_memory
from eagle_model import EagleConfig, EagleForConditionalGeneration, preset
from eagle_model.layers import linear_layers
from eagle_model.lora import add_lora, is_adapter
from eagle_model.memory import decoder_shape, vision_shape
from tests.support.live import LiveBytes
from tests.support.models import tiny_model
from tests.support.packs import make_pack


def smollm3() -> EagleConfig:
    """The sizes of SmolLM3-3B."""
    return EagleConfig(text_config={"architectures": ["SmolLM3ForCausalLM"]}, vision_config=preset("8b").vision_config, select_layer=-1)


@pytest.mark.parametrize("name", ["tiny", "1b", "2b", "8b", "smollm3"])
def test_shapes_have_the_parameters_of_the_parts(name):
    config = smollm3() if name == "smollm3" else preset(name)
    with torch.device("meta"):
        parts = EagleForConditionalGeneration(config).parts()
    counts = {part: sum(parameter.numel() for parameter in module.parameters()) for part, module in parts.items()}
    decoder, vision = decoder_shape(config), vision_shape(config, 1024)
    assert decoder.parameters == counts["language"]
    assert vision.parameters == counts["vision"]
    assert vision.connector_parameters(decoder.hidden) == counts["connector"]


@pytest.mark.parametrize("traits", [{"attention_bias": True, "mlp_bias": True}, {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}])
def test_biases_and_qk_norms_count(traits):
    llama = preset("tiny").text_config.to_dict() | {"architectures": ["LlamaForCausalLM"], "layer_types": None}
    config = EagleConfig(text_config=llama | traits)
    with torch.device("meta"):
        language = EagleForConditionalGeneration(config).parts()["language"]
    assert decoder_shape(config).parameters == sum(parameter.numel() for parameter in language.parameters())


def test_shapes_of_the_released_size():
    config = preset("8b")
    vision = vision_shape(config, 32768)
    assert (vision.patches, vision.merge, vision.positions, vision.patch_values) == (128 * 1024, 4, 1024, 588)
    decoder = decoder_shape(config)
    # 8B model, counted on the meta device
    assert decoder.parameters == 7_615_616_512
    assert vision.parameters == 413_327_088
    assert vision.connector_parameters(decoder.hidden) == 29_376_512
    assert vision.learns
    assert not vision_shape(config, 100, training=Training("frozen")).learns


@pytest.mark.parametrize("targets", [None, ("q_proj", "fc1", "mlp.down_proj", "mlp1.3")])
def test_adapters_are_those_that_the_model_gets(targets):
    config = preset("1b")
    with torch.device("meta"):
        model = EagleForConditionalGeneration(config)
    lora = Training("lora", rank=4, targets=targets)
    decoder, tower = decoder_shape(config, lora), vision_shape(config, 1024, training=lora, connector=lora)
    planned = {"language": decoder.total, "vision": tower.total, "connector": tower.connector_total(decoder.hidden)}
    for part, counted in planned.items():
        own = [name for name in linear_layers(model, part) if targets is None or any(f".{name}".endswith(f".{end}") for end in targets)]
        with torch.device("meta"):
            add_lora(model, part, rank=4, alpha=8.0, targets=own)
        adapters = sum(p.numel() for name, p in model.parts()[part].named_parameters() if is_adapter(name))
        assert counted.trained == adapters > 0


@pytest.mark.parametrize("mode", ["full", "lora", "frozen"])
def test_the_peak_of_a_step_is_the_planned_one(mode):
    """Forward and backward in float32 on the CPU with a checkpoint in every layer. Its operators are plain torch: the tolerance is 8 %."""
    torch.manual_seed(0)
    tokens, sizes = 1024, {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 2000}
    model = tiny_model(text_config=sizes | {"num_attention_heads": 4, "num_key_value_heads": 2})
    if mode == "lora":
        add_lora(model, "language", rank=16, alpha=32.0)
    language, connector = Training(mode, rank=16 if mode == "lora" else 0), Training("full" if mode == "frozen" else "frozen")
    owners = {id(parameter): part for part, module in model.parts().items() for parameter in module.parameters()}
    trained = {"vision": "frozen", "connector": connector.mode, "language": mode}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[owners[id(parameter)]] == ("lora" if is_adapter(name) else "full"))
    model.set_activation_checkpointing("recompute", None)
    config = model.config
    tiles = tokens // 2 // config.tokens_per_tile
    ids = torch.randint(101, 2000, (tokens,))
    ids[: tiles * config.tokens_per_tile] = 100
    images = torch.zeros(tiles, config.tile_size, config.tile_size, 3, dtype=torch.uint8)
    pack = make_pack(ids, (tokens,), tiles=images, targets=ids.clamp(min=101), token_weights=torch.ones(tokens), denominator=float(tokens))
    there = sum(tensor.nbytes for tensor in (*model.parameters(), images))
    with LiveBytes() as live:
        model(pack).loss.backward()
    tower = vision_shape(config, tokens // 2, training=Training("frozen"), connector=connector)
    plan = plan_memory(decoder_shape(config, language), tokens, vision=tower, weight_bytes=4, gradient_bytes=4, activation_bytes=4)
    assert plan.gpu == pytest.approx(there + live.peak, rel=0.08)
