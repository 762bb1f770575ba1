"""A tiny SigLIP, connector and language model over context-parallel ranks: the loss and every gradient equal one process, also with ranks
without tiles."""

import functools
import itertools

import numpy as np
import pytest
import torch

from eagle_cp import ContextMesh, Layout, exchange_tiles, plan_tiles, register_attention
from tests.support.attention import assert_same_order, record, recorded

TOKENS_PER_TILE = 4


@functools.cache
def models(attention):
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    vision = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
            vision_use_head=False, attn_implementation="eager",
        )
    )  # fmt: skip
    connector = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    language = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            attn_implementation=attention,
        )
    )  # fmt: skip
    return torch.nn.ModuleDict({"vision": vision, "connector": connector, "language": language}).double()


def batch(case):
    """Documents of `lengths` tokens; `tiles`: (document, its token at which the features of a tile start)."""
    generator = torch.Generator().manual_seed(3)
    cu = [0, *np.cumsum(case["lengths"]).tolist()]
    ids = torch.randint(1, 50, (cu[-1],), generator=generator)
    for document, at in case["tiles"]:
        ids[cu[document] + at : cu[document] + at + TOKENS_PER_TILE] = 0  # 0 is the image token
    pixels = torch.randn(len(case["tiles"]), 3, 8, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 50, (cu[-1],), generator=generator)
    weights = torch.rand(cu[-1], generator=generator, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in case["lengths"]])
    return cu, ids, pixels, targets, weights, positions


def loss_of(logits, targets, weights, total):
    return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / total


def sharded_step(meshes, case):
    register_attention()
    model = models("eagle_cp")
    model.zero_grad()
    cu, ids, pixels, targets, weights, positions = batch(case)
    mesh = meshes[case["ulysses"]] if meshes else ContextMesh.single()
    layout = Layout.build(cu, mesh, num_heads=4, num_kv_heads=2)
    plan = plan_tiles(layout, ids == 0, TOKENS_PER_TILE)
    record(mesh)
    mine = pixels[plan.first : plan.last]
    encoded = model["vision"](
        mine if len(mine) else torch.zeros(1, 3, 8, 8).double()
    ).last_hidden_state  # its reshapes need at least one image
    features = model["connector"](encoded[: len(mine)])
    rows = exchange_tiles(features, layout, plan)
    embeds = model["language"].get_input_embeddings()(layout.shard(ids))
    embeds = embeds.index_copy(0, plan.local_rows, rows)
    out = model["language"](inputs_embeds=embeds[None], position_ids=layout.shard(positions)[None], use_cache=False, eagle_layout=layout)
    loss = loss_of(out.logits[0], layout.shard(targets), layout.shard(weights), weights.sum())
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads, recorded(mesh), plan.last - plan.first


def plain_step(case):
    """One process, no packing: each document alone, with torch's attention."""
    model = models("sdpa")
    model.zero_grad()
    cu, ids, pixels, targets, weights, _ = batch(case)
    features = model["connector"](model["vision"](pixels).last_hidden_state).flatten(0, 1) if len(pixels) else None
    embeds = model["language"].get_input_embeddings()(ids)
    if features is not None:
        embeds = embeds.masked_scatter((ids == 0)[:, None], features)
    logits = [model["language"](inputs_embeds=embeds[None, a:b], use_cache=False).logits[0] for a, b in itertools.pairwise(cu)]
    loss = loss_of(torch.cat(logits), targets, weights, weights.sum())
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    {"lengths": [30, 12, 5], "tiles": [(0, 2), (0, 6), (0, 20), (1, 1), (1, 7)]},
    {"lengths": [40, 3], "tiles": [(0, 30)]},  # fewer tiles than ranks
    {"lengths": [9, 8, 7, 3], "tiles": []},
    {"lengths": [6, 40, 5], "tiles": [(0, 1), (1, 2), (1, 30), (2, 0)]},  # rows of a rank in another order than tiles
]


def compare(results, case):
    loss, expected = plain_step(case)
    assert abs(sum(r[0] for r in results) - loss) < 1e-12
    assert_same_order([result[2] for result in results])
    for name, grad in expected.items():
        total = sum(r[1].get(name, 0) for r in results)
        np.testing.assert_allclose(total, grad, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_one_process(case):
    compare([sharded_step(None, case)], case)


@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (2, 2), (3, 1), (4, 2)])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_vision_connector_and_language(ranks, size, ulysses, case):
    results = ranks(size).call(sharded_step, {**case, "ulysses": ulysses})
    assert sum(r[3] for r in results) == len(case["tiles"])
    assert max(r[3] for r in results) - min(r[3] for r in results) <= 1
    compare(results, case)


def test_bad_plans():
    layout = Layout.build([0, 10], ContextMesh.single(), num_heads=1, num_kv_heads=1)
    with pytest.raises(ValueError, match="3 feature tokens are not a multiple of 4"):
        plan_tiles(layout, torch.arange(10) < 3, 4)
    with pytest.raises(ValueError, match=r"expected \[10\]"):
        plan_tiles(layout, torch.zeros(9, dtype=torch.bool), 4)


def test_features_that_do_not_fit_the_plan():
    layout, other = (Layout.build([0, n], ContextMesh.single(), num_heads=1, num_kv_heads=1) for n in (10, 11))
    plan = plan_tiles(layout, torch.arange(10) < 8, 4)
    assert exchange_tiles(torch.ones(2, 4, 3), layout, plan).shape == (8, 3)
    with pytest.raises(ValueError, match=r"encodes tiles \[0, 2\) of 2, that is 8 rows of 4 per tile"):
        exchange_tiles(torch.ones(1, 4, 3), layout, plan)
    with pytest.raises(ValueError, match="the plan was made for another layout"):
        exchange_tiles(torch.ones(2, 4, 3), other, plan)


def test_tokens_per_tile_and_the_mask_are_not_floats():
    layout, mask = Layout.single([0, 10]), torch.zeros(10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"plan_tiles: tokens_per_tile: expected integers, got 2\.0"):
        plan_tiles(layout, mask, 2.0)
    with pytest.raises(ValueError, match=r"plan_tiles: is_feature is torch.float32, expected bool"):
        plan_tiles(layout, torch.full((10,), float("nan")), 2)
