"""Weights by rows: any rows are those of the whole tensor, wherever they come from, and a rank reads its shard alone."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eagle_model import initial, weights
from eagle_model.checkpoint import HEAD, checkpoint_rows, save_checkpoint
from eagle_model.eagle import EagleForConditionalGeneration
from eagle_model.initial import DRAWN_ELEMENTS, Draw, draw_rows, drawn
from eagle_model.weights import Rows, fill, grown, of_tensor, same_rows, transformed
from tests.support.models import tiny_config, tiny_model
from tests.support.ranks import run_on_ranks


def empty(**changes):
    with torch.device("meta"):
        model = EagleForConditionalGeneration(tiny_config(**changes))
    model.tie_weights()
    return model


def whole(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def allocated(model):
    nn.Module.to_empty(model, device="cpu")
    model.tie_weights()
    return model


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.sampled_from([DRAWN_ELEMENTS // 2, DRAWN_ELEMENTS // 3 + 1]),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_any_rows_are_those_of_the_whole(rows, width, seed, data):
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    draw = Draw("uniform", 0.5)
    expected = draw_rows(draw, (rows, width), seed, "a", 0, rows)
    assert torch.equal(draw_rows(draw, (rows, width), seed, "a", start, stop), expected[start:stop])


@given(start=st.integers(0, 50), count=st.integers(0, 50), width=st.integers(1, 9), unit=st.integers(1, 12), elements=st.integers(1, 60))
def test_blocks_begin_where_units_do(start, count, width, unit, elements):
    with mock.patch.object(weights, "BLOCK_ELEMENTS", elements):
        found = list(weights._blocks(start, start + count, (1000, width), unit))
    assert [row for first, last in found for row in range(first, last)] == list(range(start, start + count))
    assert all(first % unit == 0 for first, _ in found[1:])
    assert all((last - first) * width <= max(elements, unit * width) for first, last in found)


def test_no_block_is_drawn_twice(monkeypatch):
    monkeypatch.setattr(initial, "DRAWN_ELEMENTS", 300)
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 1000)
    model, counted = allocated(empty()), []
    monkeypatch.setattr(Draw, "fill_", lambda self, tensor, generator=None: counted.append(tensor.numel()))
    fill(model, drawn(model, 0))
    assert sum(counted) == sum(parameter.numel() for parameter in model.parameters())


def test_draws_differ_by_seed_name_and_block_and_have_their_distribution():
    shape = (4, DRAWN_ELEMENTS // 2)
    normal = draw_rows(Draw("normal", 0.02), shape, 0, "a", 0, 4)
    assert normal.std().item() == pytest.approx(0.02, rel=5e-3)
    assert abs(normal.mean().item()) < 5 * 0.02 / math.sqrt(normal.numel())
    assert not torch.equal(normal[:2], normal[2:])
    for seed, name in ((1, "a"), (0, "b")):
        assert not torch.equal(draw_rows(Draw("normal", 0.02), shape, seed, name, 0, 4), normal)
    uniform = draw_rows(Draw("uniform", 0.3), shape, 0, "a", 0, 4)
    assert uniform.abs().max().item() == pytest.approx(0.3, rel=1e-4)
    assert uniform.std().item() == pytest.approx(0.3 / math.sqrt(3), rel=5e-3)


def test_large_models_are_drawn_from_the_distributions_of_small_ones():
    """Standard deviations of every parameter with enough elements agree with those of a model that transformers initialises."""
    usual = tiny_model(text_config={"tie_word_embeddings": False})
    model = allocated(empty(text_config={"tie_word_embeddings": False}))
    fill(model, drawn(model, 3))
    for name, parameter in usual.named_parameters():
        ours = model.get_parameter(name)
        if parameter.numel() < 500:
            assert (ours.std(correction=0) == 0) == (parameter.std(correction=0) == 0), name
        else:
            assert ours.std().item() == pytest.approx(parameter.std().item(), rel=6 / math.sqrt(parameter.numel())), name
    assert torch.equal(model.vision_model.vision_model.embeddings.position_ids, usual.vision_model.vision_model.embeddings.position_ids)


def fill_on_rank(source, tied, folder):
    """The whole parameters of a model that this rank filled with others, and the rows that it asked for."""
    from torch.distributed.fsdp import fully_shard

    model = empty(text_config={"tie_word_embeddings": tied})
    rows = drawn(model, 5) if source == "drawn" else checkpoint_rows(model, folder)
    asked = {}

    def watched(name, one):
        def read(start, stop):
            asked[name] = asked.get(name, 0) + stop - start
            return one.read(start, stop)

        return Rows(one.shape, read)

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    allocated(model)
    fill(model, {name: watched(name, one) for name, one in rows.items()}, threads=2)
    for name, parameter in model.named_parameters():
        assert asked.get(name, 0) == parameter.to_local().shape[0], name
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    return {name: parameter.full_tensor().detach().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("source", "tied", "ranks"), [("drawn", True, 2), ("drawn", False, 3), ("files", True, 3), ("files", False, 2)])
def test_ranks_hold_the_weights_of_one_process_and_read_their_own_rows(tmp_path, monkeypatch, source, tied, ranks):
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 1000)
    start = tiny_model(text_config={"tie_word_embeddings": tied})
    save_checkpoint(start.state_dict(), start.config, tmp_path, dtype=torch.bfloat16, max_shard_bytes=20_000)
    alone = allocated(empty(text_config={"tie_word_embeddings": tied}))
    fill(alone, drawn(alone, 5) if source == "drawn" else checkpoint_rows(alone, tmp_path))
    if source == "files":
        for name, tensor in whole(start).items():
            assert torch.equal(alone.get_parameter(name), tensor.bfloat16().float()), name
    for answer in run_on_ranks(ranks, fill_on_rank, source, tied, tmp_path):
        assert answer.keys() == whole(alone).keys()
        for name, tensor in whole(alone).items():
            assert torch.equal(torch.from_numpy(answer[name]), tensor), name


def test_new_rows_are_the_mean_and_the_others_stay(monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 7)
    old = torch.randn(10, 3)
    rows = grown(of_tensor(old), 14)
    for start, stop in ((0, 14), (8, 12), (11, 13), (2, 5), (10, 10)):
        expected = torch.cat([old, old.double().mean(0).float().expand(4, -1)])[start:stop]
        assert torch.equal(rows.read(start, stop), expected), (start, stop)


def test_rows_are_compared_in_the_dtype_that_they_are_used_in():
    a = torch.randn(9, 4)
    assert same_rows(of_tensor(a), of_tensor(a.clone()), torch.float32)
    assert not same_rows(of_tensor(a), of_tensor(a.bfloat16()), torch.float32)
    assert same_rows(of_tensor(a), of_tensor(a.bfloat16()), torch.bfloat16)
    assert torch.equal(transformed(of_tensor(a), (4, 9), torch.t).read(1, 3), a.t()[1:3])


def test_what_does_not_fit_is_named():
    model = tiny_model()
    rows = {name: of_tensor(tensor) for name, tensor in whole(model).items()}
    name = "language_model.model.norm.weight"
    with pytest.raises(ValueError, match=rf"{name} is \(48,\), but there is nothing to fill it with"):
        fill(model, {key: one for key, one in rows.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name} is \(48,\), but there is \(5,\)"):
        fill(model, rows | {name: of_tensor(torch.ones(5))})
    assert HEAD not in rows, "the tied head is the embedding"
