"""The whole model: packed and padded forward agree, tiles go where they belong, and no tiles are fine."""

from dataclasses import replace

import pytest
import torch

from eagle_cp import Layout
from eagle_model import EagleConfig, EagleForConditionalGeneration
from tests.support.packs import make_pack

LENGTHS = (30, 9, 41)
TILES = (2, 0, 3)
CONTEXT = 100


@pytest.fixture
def pack():
    """Three samples of text and tiles (4 tokens a tile), flat."""
    torch.manual_seed(1)
    ids = torch.randint(0, CONTEXT, (sum(LENGTHS),))
    start = 0
    for length, count in zip(LENGTHS, TILES):
        for tile in range(count):
            ids[start + 5 + tile * 6 : start + 9 + tile * 6] = CONTEXT
        start += length
    targets = torch.randint(0, CONTEXT, ids.shape)
    targets[::3] = -100
    tiles = torch.randint(0, 256, (sum(TILES), 32, 32, 3), dtype=torch.uint8)
    return {"input_ids": ids, "tiles": tiles, "targets": targets, "token_weights": torch.rand(ids.shape[0])}


def packed(pack, lengths=LENGTHS, **changes):
    return make_pack(**(pack | changes), lengths=lengths)


def unlabelled(pack, lengths=LENGTHS):
    return make_pack(pack["input_ids"], lengths, tiles=pack["tiles"])


def slices():
    token, tile = 0, 0
    for length, count in zip(LENGTHS, TILES):
        yield slice(token, token + length), slice(tile, tile + count)
        token, tile = token + length, tile + count


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("language", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "SmolLM3ForCausalLM"])
def test_packed_equals_one_by_one(make_model, pack, language):
    model = make_model(text_config={"architectures": [language]})
    whole = model(packed(pack, denominator=17.0)).loss
    whole.backward()
    together = gradients(model)
    model.zero_grad()
    logits = model(unlabelled(pack)).logits
    total = 0.0
    for (tokens, tiles), length in zip(slices(), LENGTHS):
        part = {key: value[tiles if key == "tiles" else tokens] for key, value in pack.items()}
        part["tiles"] = part["tiles"] if len(part["tiles"]) else None
        loss = model(packed(part, [length], denominator=17.0)).loss
        loss.backward()
        total += loss.item()
        alone = model(unlabelled(part, [length])).logits
        torch.testing.assert_close(logits[tokens], alone, atol=1e-5, rtol=1e-5)
    assert whole.item() == pytest.approx(total, abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, atol=1e-5 * max(1.0, gradient.abs().max().item()), rtol=1e-4, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_equals_padded(make_model, pack, side):
    model = make_model()
    logits = model(unlabelled(pack)).logits
    ids = torch.full((3, max(LENGTHS)), 7)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    expected_labels = torch.full_like(pack["input_ids"], -100)
    for row, ((tokens, _), length) in enumerate(zip(slices(), LENGTHS)):
        place = slice(-length, None) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = pack["input_ids"][tokens], 1
        labels[row, place] = pack["input_ids"][tokens]
        expected_labels[tokens.start : tokens.stop - 1] = pack["input_ids"][tokens][1:]
    answer = model(ids, attention_mask=mask, pixel_values=pack["tiles"], labels=labels)
    torch.testing.assert_close(answer.logits[mask.bool()], logits, atol=1e-5, rtol=1e-5)
    assert answer.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, expected_labels).item(), abs=1e-5)
    last = model(ids, attention_mask=mask, pixel_values=pack["tiles"], logits_to_keep=2).logits
    torch.testing.assert_close(last, answer.logits[:, -2:])
    floats = (pack["tiles"].permute(0, 3, 1, 2).float() / 127.5) - 1
    torch.testing.assert_close(model(ids, attention_mask=mask, pixel_values=floats).logits, answer.logits, atol=1e-5, rtol=1e-5)


def test_parts_and_blocks(make_model):
    """Every parameter is in exactly one part, and the blocks are the repeated layers in the order in which forward runs them."""
    model = make_model()
    names = [f"{part}: {id(p)}" for part, module in model.parts().items() for p in module.parameters()]
    assert sorted(name.split()[1] for name in names) == sorted(str(id(p)) for p in model.parameters())
    ran = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda module, _: ran.append(module))
    model(make_pack(torch.arange(5), tiles=torch.zeros(0, 32, 32, 3, dtype=torch.uint8)))
    assert ran == model.blocks() == model.blocks("vision") + model.blocks("connector") + model.blocks("language")
    assert len(model.blocks("vision")) == model.config.vision_config.num_hidden_layers
    assert len(model.blocks("language")) == model.config.text_config.num_hidden_layers


def test_tile_features_stand_where_their_tokens_are(make_model, pack):
    model = make_model()
    features = model.image_features(pack["tiles"])
    assert features.shape == (5, 4, 48)
    embedded = model.embed(pack["input_ids"], pack["tiles"])
    at = pack["input_ids"] == CONTEXT
    torch.testing.assert_close(embedded[at], features.flatten(0, 1))
    torch.testing.assert_close(embedded[~at], model.get_input_embeddings()(pack["input_ids"][~at]))
    index = at.nonzero().squeeze(1)
    assert torch.equal(model.embed(pack["input_ids"], pack["tiles"], index), embedded)
    with pytest.raises(ValueError, match="20 visual tokens"):
        model.embed(pack["input_ids"], pack["tiles"][:4])


def test_no_tiles(make_model):
    model = make_model()
    ids = torch.arange(12)
    empty = torch.zeros(0, 32, 32, 3, dtype=torch.uint8)
    assert model.image_features(empty).shape == (0, 4, 48)
    model(make_pack(ids, targets=ids, denominator=1.0)).loss.backward()
    without = gradients(model)
    assert not any(name.startswith(("vision_model", "mlp1")) for name in without)
    model.zero_grad()
    model(make_pack(ids, tiles=empty, targets=ids, denominator=1.0)).loss.backward()
    with_pixels = gradients(model)
    assert set(with_pixels) == {name for name, _ in model.named_parameters()}
    assert all(with_pixels[name].abs().max() == 0 for name in with_pixels if name.startswith(("vision_model", "mlp1")))
    assert all(torch.equal(with_pixels[name], without[name]) for name in without)


@pytest.mark.parametrize("mode", ["recompute", "offload"])
def test_activation_checkpointing_changes_nothing(make_model, pack, mode):
    model = make_model()
    results = []
    for chosen in ("keep", mode, "keep"):
        model.set_activation_checkpointing(chosen)
        model.zero_grad()
        model(packed(pack, denominator=3.0)).loss.backward()
        results.append(gradients(model))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])
    with pytest.raises(ValueError, match="offload"):
        model.set_activation_checkpointing("some")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_pixel_shuffle": False, "mlp_connector_layers": 1},
        {"mlp_connector_layers": 1},
        {"select_layer": -2},
        {"downsample_ratio": 0.25},
        {"downsample_ratio": 0.1, "vision_config": {"image_size": 60, "patch_size": 2}},
        {"vision_config": {"image_size": 48, "patch_size": 12, "hidden_size": 40, "num_attention_heads": 5}},
    ],
)
def test_other_shapes(make_model, make_config, changes):
    model = make_model(make_config(**changes))
    k = model.tokens_per_tile
    side = model.config.tile_size
    tiles = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    features = model.image_features(tiles)
    assert features.shape == (2, k, 48)
    ids = torch.tensor([1, *[CONTEXT] * (2 * k), 2])
    out = model(make_pack(ids, tiles=tiles))
    assert out.logits.isfinite().all()


def test_impossible_configurations(make_config):
    for changes, words in (
        ({"force_image_size": 64}, "force_image_size"),
        ({"downsample_ratio": 0.4}, "downsample_ratio"),
        ({"downsample_ratio": 1 / 3}, "downsample_ratio"),
        ({"downsample_ratio": 0}, "downsample_ratio 0 must be 1/n"),
        ({"downsample_ratio": 2.0}, "downsample_ratio 2.0 must be 1/n"),
        ({"downsample_ratio": float("nan")}, "downsample_ratio nan must be 1/n"),
        ({"select_layer": 1.5}, r"select_layer is 1\.5"),
        ({"text_config": {"attention_dropout": 0.1}}, "text_config.attention_dropout"),
    ):
        with pytest.raises(ValueError, match=words):
            EagleForConditionalGeneration(make_config(**changes))


def test_wrong_use_is_said(make_model, make_config):
    model = make_model()
    batch = make_pack(torch.arange(3))
    with pytest.raises(TypeError, match="target"):
        model(batch, target=torch.arange(3))
    with pytest.raises(TypeError, match="attention_mask"):
        model(batch, Layout.single([0, 3]))
    with pytest.raises(TypeError, match=r"ndarray.*batch\.to"):
        model(replace(batch, input_ids=batch.input_ids.numpy()))
    with pytest.raises(TypeError, match="PackedBatch"):
        model(torch.ones(1, 3, dtype=torch.long), layout=Layout.single([0, 3]))
    with pytest.raises(TypeError, match=r"output_attentions.*never formed"):
        model(torch.ones(1, 3, dtype=torch.long), output_attentions=True)
    with pytest.raises(ValueError, match="neither"):
        model()
    with pytest.raises(ValueError, match="both"):
        model(torch.ones(1, 3, dtype=torch.long), inputs_embeds=torch.zeros(1, 3, 48))
    with pytest.raises(ValueError, match="attention_mask"):
        model(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="row 1"):
        model(torch.ones(2, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    unset = make_model(make_config(image_token_index=None))
    with pytest.raises(ValueError, match="image_token_index"):
        unset.embed(torch.arange(3), torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_initial_weights(make_model):
    """SigLIP's attention is Xavier, norms are one, biases zero, the rest has the language model's width."""
    model = make_model(text_config={"initializer_range": 0.05}, vision_config={"hidden_size": 64})
    state = model.state_dict()
    query = state["vision_model.vision_model.encoder.layers.0.self_attn.q_proj.weight"]
    assert query.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)
    assert state["language_model.model.layers.1.mlp.up_proj.weight"].std().item() == pytest.approx(0.05, rel=0.1)
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert (tensor == 0).all(), name
        if "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all(), name


def test_initial_patch_embedding(make_model):
    """SigLIP's own deviation unless the configuration gives one, which its file keeps."""
    name = "vision_model.vision_model.embeddings.patch_embedding.weight"
    weight = make_model().state_dict()[name]
    assert weight.std().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.2)
    wide = make_model(patch_initializer_range=0.3)
    assert wide.state_dict()[name].std().item() == pytest.approx(0.3, rel=0.1)
    assert EagleConfig(**wide.config.to_dict()).patch_initializer_range == 0.3
    assert "patch_initializer_range" not in make_model().config.to_dict()


def test_resizing_the_vocabulary_keeps_a_head_that_takes_its_loss(make_model):
    for tied in (True, False):
        model = make_model(text_config={"tie_word_embeddings": tied})
        model.resize_token_embeddings(131)
        ids = torch.arange(119, 131)
        out = model(make_pack(ids, targets=ids, denominator=1.0))
        assert out.loss.isfinite()
        assert model(ids[None]).logits.shape == (1, 12, 131)
        assert model.config.text_config.vocab_size == 131
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_bfloat16_stays_near_float32(make_model, pack):
    model = make_model()
    batch = packed(pack, denominator=17.0)
    exact = model(batch).loss
    rounded = model.to(torch.bfloat16)(batch).loss
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    rounded.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_stays_near_float32(make_model, pack):
    """Both modes under autocast: float32 parameters and gradients, matmuls in bfloat16."""
    model = make_model()
    batch = packed(pack, denominator=17.0)
    exact = model(batch).loss
    ids = pack["input_ids"][None, :30]
    tiles = pack["tiles"][: TILES[0]]
    logits = model(ids, pixel_values=tiles).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch).loss
        first = model(ids[:, :25], pixel_values=tiles, use_cache=True)
        rest = model(ids[:, 25:], past_key_values=first.past_key_values).logits
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded.item() != exact.item()
    torch.testing.assert_close(rest.float(), logits[:, 25:], atol=0.05 * logits.abs().max().item(), rtol=0)
    rounded.backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_visual_tokens_without_tiles_are_refused(make_model, pack):
    batch = packed(pack)
    with pytest.raises(ValueError, match=rf"{len(batch.visual_index)} visual tokens \(visual_index\) but no tiles"):
        make_model()(replace(batch, tiles=None))
