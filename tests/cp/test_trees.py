"""Trees: outputs and gradients equal those of the branches as separate documents, on one rank and over every split."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eagle_cp import ContextMesh, Layout, attention, exchange_tiles, plan_tiles, register_attention
from eagle_cp.backends import KERNELS
from eagle_cp.partition import partition
from eagle_cp.trees import check_prefixes
from tests.support.attention import (
    assemble,
    assert_same_order,
    cumulative,
    make_inputs,
    reference_gradients,
    split_attention,
    tree_reference,
)

SPLITS = [(size, u) for size in (2, 3, 4, 8) for u in range(1, size + 1) if size % u == 0]
HEADS = [(8, 2), (28, 4), (9, 3), (8, 1), (8, 8), (12, 4)]


def pack(trees):
    """Lengths and prefixes of `trees`: (tokens of the prefix, tokens of its branches)."""
    lengths, prefixes = [], []
    for prefix, branches in trees:
        prefixes += [-1] + [len(lengths)] * len(branches)
        lengths += [prefix, *branches]
    return lengths, prefixes


def tree(prefix, branches):
    return st.tuples(prefix, branches)


none = st.just([])
packs = st.one_of(
    st.lists(tree(st.integers(1, 40), st.lists(st.integers(1, 15), max_size=4)), min_size=1, max_size=8),  # anything, plain documents too
    tree(st.integers(80, 200), st.lists(st.integers(1, 9), min_size=1, max_size=8)).map(lambda t: [t]),  # one video, many questions
    st.tuples(tree(st.integers(60, 150), st.lists(st.integers(1, 6), min_size=1, max_size=6)), st.lists(tree(st.integers(1, 12), none)))
    .map(lambda x: [x[0], *x[1]]),  # a tree among plain documents
    st.lists(tree(st.integers(1, 4), st.lists(st.integers(1, 60), min_size=1, max_size=3)), min_size=1, max_size=4),  # long branches
    st.lists(tree(st.integers(1, 3), st.lists(st.just(1), min_size=1, max_size=6)), min_size=1, max_size=10),  # tiny
)  # fmt: skip


def small_calls(meshes, case):
    """`split_attention` where long pieces, and keys gathered one head at a time, begin at few rows."""
    pieces, gather = sys.modules["eagle_cp.rank_attention"], sys.modules["eagle_cp.all_gather"]
    mesh = meshes[case["ulysses"]]
    before = pieces.LONG_PIECE, gather.HEADWISE_ROWS, mesh.all_gather_gb_s
    pieces.LONG_PIECE, gather.HEADWISE_ROWS = case["long"], 1
    mesh.all_gather_gb_s = 1e-6 if case["overlap"] else 1e12
    try:
        return split_attention(meshes, case)
    finally:
        pieces.LONG_PIECE, gather.HEADWISE_ROWS, mesh.all_gather_gb_s = before


def check(ranks, size, case, function=split_attention):
    results = ranks(size).call(function, case)
    got = assemble(results, sum(case["lengths"]))
    wanted = tree_reference(*make_inputs(case), case["lengths"], case["prefixes"], causal=case["causal"])
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, wanted):
        error = (a - b).abs().max().item()
        assert error <= 1e-10, f"{name} is off by {error:.2e}"
    assert_same_order([result[2] for result in results])


@settings(deadline=None, max_examples=60)
@given(packs, st.sampled_from(HEADS), st.booleans(), st.integers(0, 1000))
def test_exact_on_one_rank(trees, heads, causal, seed):
    lengths, prefixes = pack(trees)
    q, k, v, dout = make_inputs({"lengths": lengths, "heads": heads[0], "kv_heads": heads[1], "dim": 8, "seed": seed})
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, Layout.single(cumulative(lengths), prefixes), causal=causal)
    got = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for a, b in zip(got, tree_reference(q, k, v, dout, lengths, prefixes, causal=causal)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "ulysses"), SPLITS)
def test_exact_on_random_trees(ranks, size, ulysses):
    heads = [h for h in HEADS if h[0] >= ulysses]

    @settings(deadline=None, max_examples=20 if size < 8 else 10, suppress_health_check=list(HealthCheck), database=None)
    @given(packs, st.sampled_from(heads), st.booleans(), st.integers(0, 1000))
    def run(trees, h, causal, seed):
        lengths, prefixes = pack(trees)
        check(ranks, size, {
            "lengths": lengths, "prefixes": prefixes, "heads": h[0], "kv_heads": h[1], "dim": 8, "causal": causal, "seed": seed,
            "ulysses": ulysses,
        })  # fmt: skip

    run()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (3, 1), (4, 2)])
def test_long_pieces_and_one_head_at_a_time(ranks, size, ulysses, causal, overlap):
    for trees in ([(160, [9, 4, 1])], [(30, [20, 20]), (7, []), (64, [3, 50])], [(3, [1]), (2, [1, 1])]):
        lengths, prefixes = pack(trees)
        for long in (1, 8, 40):
            check(ranks, size, {
                "lengths": lengths, "prefixes": prefixes, "heads": 14, "kv_heads": 7, "dim": 8, "causal": causal, "seed": 3,
                "ulysses": ulysses, "long": long, "overlap": overlap,
            }, small_calls)  # fmt: skip


def test_bf16_error_is_that_of_one_rank(ranks):
    lengths, prefixes = pack([(300, [20, 7, 33]), (40, []), (60, [5, 50])])
    case = {
        "lengths": lengths, "prefixes": prefixes, "heads": 8, "kv_heads": 2, "dim": 32, "causal": True, "seed": 0, "dtype": "bfloat16",
    }  # fmt: skip
    inputs = make_inputs(case)
    wanted = tree_reference(*inputs, lengths, prefixes)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    out = attention(*leaves, Layout.single(cumulative(lengths), prefixes))
    one = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
    for size, ulysses in ((2, 1), (4, 2), (4, 4)):
        split = assemble(ranks(size).call(split_attention, case | {"ulysses": ulysses}), sum(lengths))
        for name, a, b, ref in zip(("out", "dq", "dk", "dv"), split, one, wanted):
            error, single = (a - ref).norm() / ref.norm(), (b.double() - ref).norm() / ref.norm()
            assert error <= 1.1 * single, f"{name}: {error:.2e} on {size} ranks, {single:.2e} on one"


def test_bf16_error_is_at_most_twice_that_of_separate_documents():
    lengths, prefixes = pack([(300, [20, 7, 33]), (60, [5, 50])])
    q, k, v, dout = make_inputs({"lengths": lengths, "heads": 8, "kv_heads": 2, "dim": 32, "seed": 0, "dtype": "bfloat16"})
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, Layout.single(cumulative(lengths), prefixes))
    ours = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    wanted = tree_reference(q, k, v, dout, lengths, prefixes)
    # Every branch behind a copy of its prefix, whose copies carry no incoming gradient: what separate samples compute.
    cu = cumulative(lengths)
    rows = [[*range(cu[p], cu[p + 1]), *range(cu[i], cu[i + 1])] for i, p in enumerate(prefixes) if p >= 0]
    for i, p in enumerate(prefixes):
        if p < 0:
            continue
        own = rows.pop(0)
        index, n = torch.tensor(own), lengths[i]
        alone = attention(q[index], k[index], v[index], Layout.single([0, len(own)]))[-n:]
        at = slice(cu[i], cu[i + 1])
        errors = [(x[at if x is ours[0] else slice(None)].double() - wanted[0][at]).norm() for x in (ours[0], alone)]
        assert errors[0] <= 2 * errors[1], (i, errors)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, wanted):
        assert (a.double() - b).norm() <= 4e-3 * b.norm(), name  # bfloat16 rounds to 2^-8 = 3.9e-3


def test_without_branches_it_is_the_plain_layout():
    """The same partition, and bitwise the same numbers, whether prefixes are not given or are all -1."""
    lengths = [50, 3, 17, 1, 8]
    inputs = make_inputs({"lengths": lengths, "heads": 8, "kv_heads": 2, "dim": 8, "seed": 0, "dtype": "bfloat16"})
    results = []
    for layout in (Layout.single(cumulative(lengths)), Layout.single(cumulative(lengths), [-1] * 5)):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = attention(*leaves, layout)
        results.append([out, *torch.autograd.grad(out, leaves, inputs[3])])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert check_prefixes([-1] * 5, 5) == ()


def test_one_branch_is_one_document():
    """A tree with one branch equals prefix and branch as one document."""
    lengths, prefixes = pack([(40, [9]), (7, [30])])
    inputs = make_inputs({"lengths": lengths, "heads": 8, "kv_heads": 2, "dim": 8, "seed": 0})
    wanted = reference_gradients(*inputs, [0, 49, 86])
    leaves = [x.requires_grad_() for x in inputs[:3]]
    out = attention(*leaves, Layout.single(cumulative(lengths), prefixes))
    for a, b in zip([out, *torch.autograd.grad(out, leaves, inputs[3])], wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=200)
@given(packs, st.integers(1, 16))
def test_partition_covers_every_token_once_with_equal_tokens(trees, ranks):
    lengths, prefixes = pack(trees)
    parts = partition(lengths, ranks, prefixes=prefixes)
    seen, tokens, work = [], [], []
    for documents in parts.ranks:
        spans = [(p.document, p.start, p.stop) for p in documents.pieces] + [(d, 0, lengths[d]) for d in documents.whole]
        seen += [(d, t) for d, a, b in spans for t in range(a, b)]
        tokens.append(sum(b - a for _, a, b in spans))
        work.append(sum(t + 1 + (lengths[prefixes[d]] if prefixes[d] >= 0 else 0) for d, a, b in spans for t in range(a, b)))
        assert list(documents.pieces) == sorted(documents.pieces)
        for d in documents.whole:  # a whole branch is where its prefix is
            assert prefixes[d] < 0 or prefixes[d] in documents.whole
    assert sorted(seen) == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    assert max(tokens) - min(tokens) <= 1
    assert tuple(work) == parts.work


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "trees",
    [
        [(131072, [256] * 8)],
        [(4096, [128] * 7)] * 32,
        [(65536, [3000] * 20)],
        [(20000, [3000, 5000, 700])],
        [(20000 + 977 * i, [100 + i] * (i % 9)) for i in range(20)],
    ],
)
def test_work_is_balanced_within_5_percent(trees, ranks):
    lengths, prefixes = pack(trees)
    parts = partition(lengths, ranks, prefixes=prefixes)
    assert parts.imbalance <= 0.05, parts.imbalance


def test_positions_continue_behind_the_prefix():
    layout = Layout.single([0, 3, 5, 6, 8], [-1, 0, 0, -1])
    assert layout.position_ids().tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert layout.longest == 5
    assert Layout.single([0, 3, 5]).position_ids().tolist() == [0, 1, 2, 0, 1]
    assert "4 documents, 2 of them branches, 8 tokens" in repr(layout)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([-1, 0], "2 numbers for 4 documents"),
        ([-1, 0, 2, -1], "document 2 continues document 2"),
        ([-1, -2, 0, -1], "document 1 continues document -2"),
        ([-1, 0, 1, -1], "document 1, which has a prefix itself"),
        ([-1, 0, -1, 0], "document 2 is between them"),
        ([-1, 0.5, 0, -1], "expected integers"),
    ],
)
def test_prefixes_that_are_not_trees(prefixes, message):
    with pytest.raises(ValueError, match=message):
        Layout.single([0, 3, 5, 6, 8], prefixes)


def bad_prefixes(meshes, wrong_rank):
    prefixes = [-1, 0, -1] if meshes[1].rank == wrong_rank else [-1, 0, 0]
    try:
        Layout.build([0, 4, 6, 9], meshes[1], num_heads=2, num_kv_heads=1, prefixes=prefixes, verify=True)
    except ValueError as error:
        return str(error)
    return None


def test_ranks_with_other_trees_are_named(ranks):
    errors = ranks(3).call(bad_prefixes, 1)
    assert len(set(errors)) == 1
    assert "[0, 2] / [1]" in errors[0]


def test_a_tile_plan_belongs_to_its_tree():
    mesh = ContextMesh.single()
    layouts = [Layout.build([0, 4, 6], mesh, num_heads=1, num_kv_heads=1, prefixes=prefixes) for prefixes in (None, [-1, 0])]
    plan = plan_tiles(layouts[0], torch.tensor([True] * 4 + [False] * 2), 2)
    with pytest.raises(ValueError, match="made for another layout"):
        exchange_tiles(torch.zeros(4, 3), layouts[1], plan)


def test_a_kernel_that_needs_the_causal_mask_leaves_prefixes_to_another(monkeypatch):
    calls = []

    def forward(q, k, v, segments, causal, scale, out):
        calls.append(causal)
        return KERNELS["cpu"].forward(q, k, v, segments, causal, scale, out)

    spy = dataclasses.replace(
        KERNELS["cpu"], forward=forward, unsupported=lambda device, dtype, dim, causal: None if causal else "causal only"
    )
    monkeypatch.setitem(KERNELS, "causal", spy)
    lengths, prefixes = pack([(6, [3, 2])])
    q, k, v, dout = make_inputs({"lengths": lengths, "heads": 4, "kv_heads": 2, "dim": 8, "seed": 0})
    out = attention(q, k, v, Layout.single(cumulative(lengths), prefixes), backend="causal")
    assert calls == [True]
    torch.testing.assert_close(out, tree_reference(q, k, v, dout, lengths, prefixes)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2])
def test_results_of_a_kernel_are_not_modified(ranks, size):
    """Selective activation checkpointing stores them, and recomputation would merge the prefix a second time."""
    lengths, prefixes = pack([(6, [3, 2]), (40, [5])])
    assert (
        all(ranks(size).call(kept_results, lengths, prefixes)) if size > 1 else kept_results({1: ContextMesh.single()}, lengths, prefixes)
    )


def kept_results(meshes, lengths, prefixes):
    results = []

    def forward(*arguments, **options):
        lse = KERNELS["cpu"].forward(*arguments, **options)
        results.append((lse, lse.clone()))
        return lse

    KERNELS["keeps"] = dataclasses.replace(KERNELS["cpu"], forward=forward)
    try:
        layout = Layout.build(cumulative(lengths), meshes[1], num_heads=4, num_kv_heads=2, prefixes=prefixes)
        inputs = make_inputs({"lengths": lengths, "heads": 4, "kv_heads": 2, "dim": 8, "seed": 0})
        attention(*(layout.shard(x) for x in inputs[:3]), layout, backend="keeps")
    finally:
        del KERNELS["keeps"]
    return len(results) > 1 and all(torch.equal(lse, before) for lse, before in results)


def test_a_transformers_model_takes_trees():
    """Hidden states of a tiny Qwen2, and the gradient of its embedding, equal those of the branches as separate documents."""
    from transformers import Qwen2Config, Qwen2Model

    register_attention()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=50, attn_implementation="eagle_cp", **sizes)
    torch.manual_seed(0)
    model = Qwen2Model(config).double()
    lengths, prefixes = pack([(9, [4, 2, 5]), (3, [])])
    cu, generator = cumulative(lengths), torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (cu[-1],), generator=generator)
    weight = torch.randn(cu[-1], 16, dtype=torch.float64, generator=generator)

    def run(rows, layout):
        hidden = model(
            input_ids=ids[rows][None], position_ids=layout.position_ids()[None], use_cache=False, eagle_layout=layout
        ).last_hidden_state[0]
        return hidden

    everything = torch.arange(cu[-1])
    together = run(everything, Layout.single(cu, prefixes))
    separate = torch.empty_like(together)
    for i, p in enumerate(prefixes):
        own = torch.arange(cu[i], cu[i + 1])
        rows = own if p < 0 else torch.cat((torch.arange(cu[p], cu[p + 1]), own))
        separate = separate.index_copy(0, own, run(rows, Layout.single([0, len(rows)]))[-len(own) :])
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-12)
    parameter = model.embed_tokens.weight
    grads = [torch.autograd.grad((hidden * weight).sum(), parameter)[0] for hidden in (together, separate)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)  # transformers' RMSNorm computes in float32


def test_the_packs_of_the_benchmark_count_the_attended_pairs():
    """By the mask, on small trees; and the separate rows are those of the branches."""
    packs = runpy.run_path(str(Path(__file__).parents[2] / "packages/eagle-cp/benchmarks/packs.py"))
    made = packs["Trees"].of([5, 1, 7], 3, 2)
    document = torch.arange(len(made.lengths)).repeat_interleave(torch.tensor(made.lengths))
    place = torch.arange(len(document))
    mask = (document[:, None] == document) & (place[:, None] >= place) | (torch.tensor(made.prefixes)[document][:, None] == document)
    assert made.pairs() == int(mask.sum())
    assert made.separate() == [7] * 3 + [3] * 3 + [9] * 3
    for pack in packs["TREES"].values():
        Layout.single([0, *torch.tensor(pack().lengths).cumsum(0).tolist()], pack().prefixes)
