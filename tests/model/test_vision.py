"""The vision side against transformers' SigLIP, and the shuffle against the formula."""

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from eagle_model.vision.connector import make_connector, pixel_shuffle
from eagle_model.vision.siglip import VisionModel, patches_of, tiles_at_once

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


def towers(select_layer, **changes):
    torch.manual_seed(0)
    theirs = SiglipVisionModel(SiglipVisionConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.15)
    ours = VisionModel(SiglipVisionConfig(**(SIZES | changes)), select_layer).eval()
    state = {key.removeprefix("vision_model."): value for key, value in theirs.state_dict().items()}
    missing, unexpected = ours.vision_model.load_state_dict(state, strict=False)
    assert not missing
    assert all(key.startswith("head.") for key in unexpected)
    return theirs, ours


def normalised(tiles):
    return (tiles.permute(0, 3, 1, 2).double() / 255 - 0.5).div(0.5).float()


@pytest.mark.parametrize("select_layer", [-1, -2, -4, 2])
def test_equals_siglip(select_layer):
    theirs, ours = towers(select_layer)
    tiles = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    answer = theirs(normalised(tiles), output_hidden_states=True)
    expected = answer.last_hidden_state if select_layer == -1 else answer.hidden_states[select_layer]
    torch.testing.assert_close(ours(tiles), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(normalised(tiles)), expected, atol=1e-5, rtol=1e-5)


def test_other_sizes():
    theirs, ours = towers(-1, image_size=42, patch_size=14, hidden_size=40, num_attention_heads=5, hidden_act="gelu")
    tiles = torch.randint(0, 256, (2, 42, 42, 3), dtype=torch.uint8)
    torch.testing.assert_close(ours(tiles), theirs(normalised(tiles)).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_pixels_beside_whole_patches_are_cut_off():
    """As in the released SigLIP of 384 pixels with patches of 14."""
    theirs, ours = towers(-1, image_size=38)
    tiles = torch.randint(0, 256, (2, 38, 38, 3), dtype=torch.uint8)
    expected = theirs(normalised(tiles)).last_hidden_state
    torch.testing.assert_close(ours(tiles), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(normalised(tiles)), expected, atol=1e-5, rtol=1e-5)


def test_checkpointing_changes_nothing():
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    _, ours = towers(-1)
    tiles = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    gradients = []
    for rebuild in (None, partial(checkpoint, use_reentrant=False)):
        ours.zero_grad()
        ours.vision_model.checkpoint = rebuild
        ours(tiles).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_wrong_size_is_said():
    _, ours = towers(-1)
    with pytest.raises(ValueError, match="positions"):
        ours(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="select_layer"):
        VisionModel(SiglipVisionConfig(**SIZES), -6)
    with pytest.raises(ValueError, match="attention_dropout"):
        VisionModel(SiglipVisionConfig(**SIZES, attention_dropout=0.5), -1)


def test_pixel_shuffle_is_the_formula():
    x = torch.randn(2, 4, 6, 8)
    n, w, h, c = x.shape
    f = 0.5
    expected = x.view(n, w, int(h * f), int(c / f)).permute(0, 2, 1, 3).contiguous()
    expected = expected.view(n, int(h * f), int(w * f), int(c / f**2)).permute(0, 2, 1, 3)
    assert torch.equal(pixel_shuffle(x, f), expected)
    # One token is its 2x2 block, row by row.
    block = torch.cat([x[:, 0, 0], x[:, 0, 1], x[:, 1, 0], x[:, 1, 1]], dim=-1)
    assert torch.equal(pixel_shuffle(x, f)[:, 0, 0], block)
    for n in (3, 5, 10):
        assert torch.equal(pixel_shuffle(x[:, :1, :1].expand(2, n, n, 8), 1 / n)[:, 0, 0], x[:, 0, 0].repeat(1, n * n))


def test_patches_are_channels_first():
    tiles = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8)
    patches = patches_of(tiles, 2)
    assert patches.shape == (1, 4, 12)
    expected = tiles[0, 0:2, 2:4].permute(2, 0, 1).flatten().float() / 127.5 - 1
    torch.testing.assert_close(patches[0, 1], expected)


def test_connectors():
    names = [name for name, _ in make_connector(16, 8, 2).named_parameters()]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert [name for name, _ in make_connector(16, 8, 1).named_parameters()] == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="mlp_connector_layers"):
        make_connector(16, 8, 3)


@pytest.mark.parametrize(
    ("width", "dtype", "device", "tiles"),
    [
        (1536, torch.float32, "cpu", 5),
        (4304, torch.bfloat16, "cpu", 3),
        (4304, torch.float32, "cpu", 1),
        (40000, torch.float32, "cpu", 1),
        (8, torch.float32, "cpu", 32),
        (4304, torch.bfloat16, "meta", 32),
    ],
)
def test_tiles_at_once(width, dtype, device, tiles):
    """On a CPU the activation of the MLP is at most 32 MiB, unless one tile's is larger."""
    config = SiglipVisionConfig(image_size=448, patch_size=14, intermediate_size=width)
    assert tiles_at_once(config, torch.empty(1, dtype=dtype, device=device), 32) == tiles


@pytest.mark.parametrize(
    "pixels", [torch.zeros(1, 32, 32, 3), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(32, 32, 3, dtype=torch.uint8)]
)
def test_pixels_of_another_form_are_refused(pixels):
    _, ours = towers(-1)
    with pytest.raises(ValueError, match=r"^pixels are torch\..*; need tiles as uint8 \[N, s, s, 3\]"):
        ours(pixels)
