"""Outputs and gradients of every split equal the float64 reference, and every rank calls the same collectives in the same order."""

import dataclasses
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eagle_cp import ContextMesh, Layout, attention
from eagle_cp.backends import KERNELS
from tests.support.attention import (
    assemble,
    assert_same_order,
    cumulative,
    make_inputs,
    reference_attention,
    reference_gradients,
    split_attention,
)

SPLITS = [(size, u) for size in (2, 3, 4, 8) for u in range(1, size + 1) if size % u == 0]
HEADS = [(8, 2), (28, 4), (9, 3), (8, 1), (8, 8), (12, 4)]


def headwise(meshes, case):
    """`split_attention` with keys gathered one head at a time, and collectives that overlap with the kernels or do not."""
    module = sys.modules["eagle_cp.all_gather"]
    before, speed = module.HEADWISE_ROWS, meshes[case["ulysses"]].all_gather_gb_s
    module.HEADWISE_ROWS, meshes[case["ulysses"]].all_gather_gb_s = 1, 1e-6 if case["overlap"] else 1e12
    try:
        return split_attention(meshes, case)
    finally:
        module.HEADWISE_ROWS, meshes[case["ulysses"]].all_gather_gb_s = before, speed


def from_meshes(meshes):
    """The ranks of a context mesh built in each way, and the errors of wrong ones."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    size = meshes[1].size
    flat = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    square = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("all_gather", "ulysses"))
    built = [
        ContextMesh.from_device_mesh(flat["cp"], ulysses=2),
        ContextMesh.from_device_mesh(square),
        ContextMesh.from_group(ulysses=2),
        meshes[2],
    ]
    transposed = DeviceMesh("cpu", torch.arange(size).view(2, -1).t(), mesh_dim_names=("all_gather", "ulysses"))
    errors = []
    for wrong in (
        lambda: ContextMesh.from_device_mesh(square, ulysses=size),
        lambda: ContextMesh.from_group(ulysses=3),
        lambda: ContextMesh.from_device_mesh(transposed),
    ):
        try:
            wrong()
        except ValueError as error:
            errors.append(str(error))
    return [(m.rank, m.size, [g.ranks for g in m.groups()]) for m in built], errors


def checkpointed(meshes, case):
    """Two layers of attention under activation checkpointing: every rank repeats its collectives in the same order."""
    from torch.utils.checkpoint import checkpoint

    mesh = meshes[case["ulysses"]]
    layout = Layout.build([0, *torch.tensor(case["lengths"]).cumsum(0).tolist()], mesh, num_heads=4, num_kv_heads=2)
    x = torch.randn(layout.total, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def layer(x):
        return x + attention(x, x[:, :2] * 2, x[:, 2:] * 3, layout)

    results = []
    for wrap in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=False)):
        local = layout.shard(x).clone().requires_grad_()
        wrap(wrap(local)).square().sum().backward()
        results.append(local.grad)
    return torch.equal(*results)


def long_pieces(meshes, case):
    """`headwise` with a kernel call for every piece of `long` queries or more."""
    module = sys.modules["eagle_cp.rank_attention"]
    before, module.LONG_PIECE = module.LONG_PIECE, case["long"]
    try:
        return headwise(meshes, case)
    finally:
        module.LONG_PIECE = before


def check(ranks, size, case, tolerance=1e-10, function=split_attention):
    results = ranks(size).call(function, case)
    got = assemble(results, sum(case["lengths"]))
    expected = reference_gradients(*make_inputs(case), cumulative(case["lengths"]), causal=case["causal"])
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected):
        error = (a - b).abs().max().item()
        assert error <= tolerance, f"{name} is off by {error:.2e}"
    assert_same_order([result[2] for result in results])


packs = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),  # anything
    st.lists(st.just(1), min_size=1, max_size=20),  # one-token documents
    st.integers(1, 200).map(lambda n: [n]),  # one document
    st.tuples(st.integers(90, 160), st.lists(st.integers(1, 6), max_size=25)).map(lambda x: [x[0], *x[1]]),  # longer than a rank's share
    st.lists(st.integers(1, 4), min_size=20, max_size=60),  # many tiny ones
)


@pytest.mark.parametrize(("size", "ulysses"), SPLITS)
def test_exact_on_random_packs(ranks, size, ulysses):
    heads = [h for h in HEADS if h[0] >= ulysses]

    @settings(deadline=None, max_examples=20 if size < 8 else 10, suppress_health_check=list(HealthCheck), database=None)
    @given(packs, st.sampled_from(heads), st.booleans(), st.integers(0, 1000))
    def run(lengths, h, causal, seed):
        check(ranks, size, {
            "lengths": lengths, "heads": h[0], "kv_heads": h[1], "dim": 8, "causal": causal, "seed": seed, "ulysses": ulysses,
        })  # fmt: skip

    run()


@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (4, 1), (4, 2), (3, 1)])
def test_whole_documents_need_no_exchange(ranks, size, ulysses):
    """Where no document is cut, results are exact, ranks may be empty, and all-gather ranks exchange nothing."""

    @settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck), database=None)
    @given(packs, st.booleans(), st.integers(0, 1000))
    def run(lengths, causal, seed):
        case = {"lengths": lengths, "heads": 4, "kv_heads": 2, "dim": 8, "causal": causal, "seed": seed, "ulysses": ulysses, "whole": True}
        check(ranks, size, case)
        records = [result[2]["all_gather"][1] for result in ranks(size).call(split_attention, case)]
        assert records == [[]] * size

    run()


@pytest.mark.parametrize(("size", "ulysses"), [(8, 8), (8, 4), (8, 1), (3, 3)])
def test_28_heads_over_any_number_of_ranks(ranks, size, ulysses):
    """28 query and 4 key/value heads: 3 or 4 query heads a rank, each key/value head on two ranks, gradients summed exactly."""
    check(ranks, size, {
        "lengths": [97, 1, 30, 2, 41], "heads": 28, "kv_heads": 4, "dim": 8, "causal": True, "seed": 1, "ulysses": ulysses,
    })  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (4, 2), (4, 1), (3, 1)])
def test_one_head_at_a_time_overlapped_or_not(ranks, size, ulysses, overlap):
    for lengths in ([120], [70, 5, 33, 2], [3, 3]):
        check(ranks, size, {
            "lengths": lengths, "heads": 14, "kv_heads": 7, "dim": 8, "causal": True, "seed": 5, "ulysses": ulysses, "overlap": overlap,
        }, function=headwise)  # fmt: skip


@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (3, 1), (4, 2)])
def test_long_pieces_alone_and_short_ones_together(ranks, size, ulysses):
    """Long pieces get kernel calls of their own, two where one is most of a rank's rows; short ones share a call."""

    @settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck), database=None)
    @given(packs, st.integers(1, 40), st.booleans(), st.integers(0, 1000))
    def run(lengths, long, causal, seed):
        check(ranks, size, {
            "lengths": lengths, "heads": 4, "kv_heads": 2, "dim": 8, "causal": causal, "seed": seed, "ulysses": ulysses, "long": long,
            "overlap": False, "tolerance": 0.0,
        }, function=long_pieces)  # fmt: skip

    run()


@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (4, 1), (8, 1), (4, 2), (2, 2)])
def test_bf16_error_is_that_of_one_rank(ranks, size, ulysses):
    """Splitting adds at most a tenth to the bf16 error of one rank's kernel, because sums over ranks are in float32."""
    case = {
        "lengths": [700, 90, 260],
        "heads": 8,
        "kv_heads": 2,
        "dim": 32,
        "causal": True,
        "seed": 2,
        "dtype": "bfloat16",
        "ulysses": ulysses,
    }
    q, k, v, dout = make_inputs(case)
    cu = cumulative(case["lengths"])
    wanted = reference_gradients(q, k, v, dout, cu)
    alone = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*alone, Layout.single(cu))
    one = (out, *torch.autograd.grad(out, alone, dout))
    split = assemble(ranks(size).call(split_attention, case), sum(case["lengths"]))
    for name, a, b, ref in zip(("out", "dq", "dk", "dv"), split, one, wanted):
        error, single = (a - ref).norm() / ref.norm(), (b.detach().double() - ref).norm() / ref.norm()
        assert error <= 1.1 * single, f"{name}: {error:.2e} on {size} ranks, {single:.2e} on one"


def test_context_meshes(ranks):
    results = ranks(4).call(from_meshes)
    for rank, (built, errors) in enumerate(results):
        assert all(m == built[0] for m in built)
        assert built[0] == (rank, 4, [[rank - rank % 2, rank - rank % 2 + 1], [rank % 2, rank % 2 + 2], [0, 1, 2, 3]])
        assert "ulysses=4, but the mesh's second dimension has 2" in errors[0]
        assert "nearest split that works is 2" in errors[1]
        assert "[[0, 2], [1, 3]]" in errors[2]  # also on ranks 0 and 3, which are in the right place


@pytest.mark.parametrize("ulysses", [1, 2])
def test_activation_checkpointing(ranks, ulysses):
    assert all(ranks(2).call(checkpointed, {"lengths": [31, 4, 1], "ulysses": ulysses}))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "dense"])
def test_kernels_get_a_dense_incoming_gradient(monkeypatch, layout):
    """The gradient of `out.sum()` has strides of 0, which not every kernel takes; a dense one is not copied."""
    seen = []

    def backward(dout, *rest):
        seen.append(dout)
        return KERNELS["cpu"].backward(dout, *rest)

    monkeypatch.setitem(KERNELS, "spy", dataclasses.replace(KERNELS["cpu"], backward=backward))
    q, k, v, dout = make_inputs({"lengths": [5, 3], "heads": 4, "kv_heads": 2, "dim": 8, "seed": 0})
    dout = {"expanded": torch.ones(()).double().expand_as(dout), "transposed": dout.mT.contiguous().mT, "dense": dout}[layout]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(attention(q, k, v, Layout.single([0, 5, 8]), backend="spy"), leaves, dout)
    assert [x.is_contiguous() for x in seen] == [True]
    assert (seen[0].data_ptr() == dout.data_ptr()) == (layout == "dense")
    for got, want in zip(grads, torch.autograd.grad(reference_attention(q, k, v, [0, 5, 8]), leaves, dout)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_order_checker_can_fail():
    calls = [[0, "all_gather", "all_gather", 8, "float32"], [1, "reduce_scatter", "all_gather", 8, "float32"]]
    agreed = {"all_gather": ([0, 1], calls)}
    assert_same_order([agreed, agreed])
    for other in (calls[::-1], calls[:1], [calls[0], [1, "reduce_scatter", "all_gather", 9, "float32"]]):
        with pytest.raises(AssertionError, match="order of collectives differs"):
            assert_same_order([agreed, {"all_gather": ([0, 1], other)}])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_kernels_do_not_take_is_refused(scale):
    q, k = torch.randn(10, 4, 8), torch.randn(10, 2, 8)
    with pytest.raises(ValueError, match=r"attention: scale is .*; expected a finite number above 0"):
        attention(q, k, k, Layout.single([0, 7, 10]), scale=scale)


def test_heads_have_a_dimension():
    q, k = torch.randn(10, 4, 0), torch.randn(10, 2, 0)
    with pytest.raises(ValueError, match="the head dimension is 0"):
        attention(q, k, k, Layout.single([0, 10]))
