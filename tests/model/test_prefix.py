"""Samples that share a prefix: the cut, and loss and gradients that equal the sum over the separate samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_cp import ContextMesh, Layout
from eagle_kernels import OffloadEngine
from eagle_model.prompt import IGNORE_INDEX, Encoded, share_prefix
from tests.support.packs import make_pack
from tests.support.ranks import run_on_ranks

IMAGE, K = 100, 4
WEIGHTINGS = {"token": lambda n: 1.0, "sample": lambda n: 1 / n, "sqrt": lambda n: n**-0.5}


def sample(generator, shared, question, answer):
    """Ids `shared`, `question` unlabelled and `answer` labelled random ids."""
    own = generator.integers(0, 99, question + answer)
    ids = np.concatenate([shared, own])
    labels = np.full(len(ids), IGNORE_INDEX)
    labels[len(shared) + question :] = own[question:]
    return Encoded(ids, labels)


def make_samples(seed=0, tiles=5):
    """Three groups of samples, and the tiles of each: two questions on a video, a text alone, three on an image."""
    generator = np.random.default_rng(seed)
    groups = []
    for visual, sizes in ((tiles - 2, [(4, 3), (6, 1)]), (0, [(5, 9)]), (2, [(1, 2), (2, 7), (9, 4)])):
        shared = np.concatenate([generator.integers(0, 99, 6), np.full(visual * K, IMAGE), generator.integers(0, 99, 2)])
        groups.append([sample(generator, shared, *size) for size in sizes])
    pixels = torch.from_numpy(generator.integers(0, 256, (tiles, 32, 32, 3)).astype(np.uint8))
    return groups, pixels


def targets_of(encoded, weighting):
    """Shifted targets and loss weights of one sample."""
    targets = np.append(encoded.labels[1:], IGNORE_INDEX)
    labels = np.count_nonzero(targets != IGNORE_INDEX)
    return targets, np.where(targets != IGNORE_INDEX, WEIGHTINGS[weighting](max(labels, 1)), 0.0)


def join(documents, tiles, weighting, prefixes=(), denominator=7.0):
    described = [targets_of(document, weighting) for document in documents]
    ids, targets, weights = (
        torch.from_numpy(np.concatenate(x)) for x in ([d.input_ids for d in documents], *([t[i] for t in described] for i in (0, 1)))
    )
    lengths = [len(document.input_ids) for document in documents]
    return make_pack(
        ids, lengths, tiles=tiles, targets=targets, token_weights=weights.float(), denominator=torch.tensor(denominator), prefixes=prefixes
    )


def trees(weighting):
    """The groups as trees in one pack (the text alone is plain)."""
    groups, tiles = make_samples()
    documents, prefixes = [], []
    for group in groups:
        if len(group) == 1:
            documents.append(group[0])
            prefixes.append(-1)
            continue
        shared = share_prefix(group)
        prefixes += [-1] + [len(documents)] * len(group)
        documents += shared.documents
    return join(documents, tiles, weighting, prefixes)


def separate(weighting):
    """The same samples as packs of one sample each, every one with its tiles."""
    groups, tiles = make_samples()
    start, packs = 0, []
    for group in groups:
        count = int(np.count_nonzero(group[0].input_ids == IMAGE)) // K
        packs += [join([one], tiles[start : start + count], weighting) for one in group]
        start += count
    return packs


def step(model, *packs, layout=None):
    model.zero_grad()
    loss = sum(model(pack, layout=layout).loss for pack in packs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(got, wanted, tolerance):
    assert got[0] == pytest.approx(wanted[0], rel=tolerance)
    assert got[1].keys() == wanted[1].keys()
    # A bias of keys in the vision tower changes no softmax: its gradient is rounding only, so errors are relative to at least this norm.
    floor = 1e-3 * max(gradient.norm() for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        error = (got[1][name] - gradient).norm() / gradient.norm().clamp(min=floor)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("weighting", list(WEIGHTINGS))
def test_a_tree_is_the_sum_over_separate_samples(make_model, weighting):
    model = make_model()
    pack, packs = trees(weighting), separate(weighting)
    assert pack.label_weight == pytest.approx(sum(one.label_weight for one in packs))
    assert len(pack.tiles) < sum(len(one.tiles) for one in packs)  # every medium once
    assert_equal_steps(step(model, pack), step(model, *packs), 1e-5)


@pytest.mark.parametrize("mode", ["recompute", "offload", "selective"])
def test_activation_checkpointing_gives_the_same_gradients(make_model, mode):
    """selective: the attention kernel's results are stored, and recomputation does not run it."""
    model = make_model()
    pack = trees("sqrt")
    wanted = step(model, pack)
    engine, kept = None, ["aten::_scaled_dot_product_flash_attention_for_cpu"] if mode == "selective" else []
    if mode != "recompute":
        engine = OffloadEngine(1 << 20, device=torch.device("cpu"), host_available=1 << 30, keep_operators=kept)
    model.set_activation_checkpointing("recompute" if engine is None else "offload", engine)
    assert_equal_steps(step(model, pack), wanted, 1e-7)


def split_step(model, ulysses):
    size = dist.get_world_size()
    mesh = ContextMesh.from_device_mesh(dist.init_device_mesh("cpu", (size // ulysses, ulysses), mesh_dim_names=("all_gather", "ulysses")))
    pack = trees("sqrt")
    layout = Layout.build(pack.cu_seqlens, mesh, num_heads=4, num_kv_heads=2, prefixes=pack.prefixes)
    pack = pack.shard(layout, K)
    pack = replace(pack, tiles=pack.tiles[pack.tile_plan.first : pack.tile_plan.last])
    loss, gradients = step(model, pack, layout=layout)
    return loss, {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.parametrize("ulysses", [1, 2])
def test_context_parallel_ranks_add_up_to_separate_samples(make_model, ulysses):
    model = make_model()
    answers = run_on_ranks(2, split_step, model, ulysses)
    total = {name: sum(torch.from_numpy(answer[1][name]) for answer in answers) for name in answers[0][1]}
    assert_equal_steps((sum(loss for loss, _ in answers), total), step(model, *separate("sqrt")), 1e-5)


def test_a_layout_of_another_pack_is_refused(make_model):
    model, pack = make_model(), trees("token")
    with pytest.raises(ValueError, match="build it from the batch's cu_seqlens and prefixes"):
        model(pack, layout=Layout.single(pack.cu_seqlens))
    with pytest.raises(ValueError, match="build it from the batch's cu_seqlens and prefixes"):
        replace(pack, prefixes=()).shard(pack.layout(), K)


tokens = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2), max_size=6), st.lists(tokens, min_size=1, max_size=4))
def test_the_cut_loses_nothing_and_no_branch_begins_with_a_label(shared, ends):
    samples = []
    for end in ends:
        ids = np.array(shared + [token for token, _ in end])
        labels = np.array([IGNORE_INDEX] * len(shared) + [token if kept else IGNORE_INDEX for token, kept in end])
        samples.append(Encoded(ids, labels))
    try:
        cut = share_prefix(samples)
    except ValueError:
        # Longest possible: a prefix of one token is impossible.
        different = len({int(one.input_ids[0]) for one in samples}) > 1
        short = min(len(one.input_ids) for one in samples) < 2
        early = any(np.any(one.labels[:2] != IGNORE_INDEX) for one in samples)
        assert different or short or early
        return
    assert np.all(cut.prefix.labels == IGNORE_INDEX)
    for one, branch in zip(samples, cut.branches, strict=True):
        assert np.array_equal(np.concatenate([cut.prefix.input_ids, branch.input_ids]), one.input_ids)
        assert np.array_equal(np.concatenate([cut.prefix.labels, branch.labels]), one.labels)
        assert branch.labels[0] == IGNORE_INDEX
    assert cut.tokens == len(cut.prefix.input_ids) + sum(len(branch.input_ids) for branch in cut.branches)
    longer = len(cut.prefix.input_ids) + 1
    possible = (
        longer < min(len(one.input_ids) for one in samples)
        and len({tuple(one.input_ids[:longer]) for one in samples}) == 1
        and all(np.all(one.labels[: longer + 1] == IGNORE_INDEX) for one in samples)
    )
    assert not possible


def test_samples_that_share_too_little_say_why():
    one, two = (Encoded(np.array(ids), np.array([-100, -100, -100, 5])) for ids in ([1, 2, 3, 5], [1, 9, 3, 5]))
    assert len(share_prefix([one, two]).prefix.input_ids) == 1
    with pytest.raises(ValueError, match="share 1 tokens, at least 2 are needed: sample 1 differs from sample 0 there"):
        share_prefix([one, two], at_least=2)
    with pytest.raises(ValueError, match="sample 0 has a label at token 3"):
        share_prefix([one, one], at_least=3)
    with pytest.raises(ValueError, match="no samples"):
        share_prefix([])
