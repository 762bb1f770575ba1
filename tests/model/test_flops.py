"""FLOPs from the configuration are those that torch counts in a forward pass."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eagle_model import EagleConfig, EagleForConditionalGeneration
from eagle_model.flops import forward_flops
from eagle_model.presets import IN_USE, PRESETS
from eagle_model.sizes import stated_sizes

#: torch 2.11 does not count its fused attention on CPUs; later releases count it so.
ON_CPUS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)}


def config_of(preset: str = "tiny", **changes) -> EagleConfig:
    values = IN_USE | deepcopy(PRESETS[preset]) | changes
    return EagleConfig(**values, force_image_size=values["vision_config"]["image_size"])


SMOLLM3 = {"text_config": PRESETS["tiny"]["text_config"] | {"architectures": ["SmolLM3ForCausalLM"], "pad_token_id": None}}


@pytest.mark.parametrize("changes", [{}, {"select_layer": -2, "mlp_connector_layers": 1}, SMOLLM3])
def test_flops_are_those_that_torch_counts(changes):
    config = config_of(**changes)
    model, flops = EagleForConditionalGeneration(config), forward_flops(config)
    tokens = 96
    with torch.no_grad():
        with FlopCounterMode(display=False, custom_mapping=ON_CPUS) as tower:
            model.image_features(torch.zeros(3, config.tile_size, config.tile_size, 3, dtype=torch.uint8))
        with FlopCounterMode(display=False, custom_mapping=ON_CPUS) as whole:
            model(torch.zeros(1, tokens, dtype=torch.int64))
    assert 3 * (flops.tile + flops.connector) == pytest.approx(tower.get_total_flops(), rel=1e-6)
    layers = model.blocks("vision")[: model.vision_model.vision_model.depth]
    linear = sum(layer.weight.numel() for block in layers for layer in block.modules() if isinstance(layer, nn.Linear))
    assert flops.tile_linear == 2 * (config.tile_size // config.vision_config.patch_size) ** 2 * linear
    # Padded mode has logits for every token; the counter counts every pair of a square, seen or not.
    assert tokens * (flops.token + flops.label) + tokens**2 * flops.pair == pytest.approx(whole.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_stated_sizes_give_the_same_flops(preset):
    config = config_of(preset)
    assert forward_flops(stated_sizes(IN_USE | PRESETS[preset] | {"force_image_size": config.tile_size})) == forward_flops(config)
    assert forward_flops(stated_sizes(config.to_diff_dict())) == forward_flops(config)


def test_a_pack_of_tiles_costs_more_than_text():
    """By how much, per token: the numbers of the documentation."""
    ratios = {}
    for preset in ("8b", "2b", "1b"):
        config = config_of(preset)
        flops = forward_flops(config)
        ratios[preset] = 1 + flops.tile / config.tokens_per_tile / flops.token
    assert ratios == pytest.approx({"8b": 1.29, "2b": 2.35, "1b": 6.31}, abs=0.01)


def test_sizes_that_are_not_stated_give_no_flops():
    values = IN_USE | deepcopy(PRESETS["8b"]) | {"force_image_size": 448}
    del values["text_config"]["hidden_size"]
    assert forward_flops(stated_sizes(values)) is None


def test_flops_are_read_without_torch():
    subprocess.run([sys.executable, "-c", "import sys; import eagle_model.flops; assert 'torch' not in sys.modules"], check=True)
