"""Outputs and gradients of every split equal the plain float64 reference, and every rank calls the same collectives in the same order."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SPLITS = [(size, u) for size in (2, 3, 4, 8) for u in range(1, size + 1) if size % u == 0]
HEADS = [(8, 2), (28, 4), (9, 3), (8, 1), (8, 8), (12, 4)]


def check(cp, ranks, size, case, tolerance=1e-10):
    results = ranks(size).call("attention", case)
    got = cp.assemble(results, sum(case["lengths"]))
    q, k, v, dout = cp.inputs(case)
    for x in (q, k, v):
        x.requires_grad_()
    out = cp.reference(q, k, v, cp.cumulative(case["lengths"]), case["causal"])
    expected = (out, *torch.autograd.grad(out, (q, k, v), dout))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected):
        error = (a - b.detach()).abs().max().item()
        assert error <= tolerance, f"{name} is off by {error:.2e}"
    cp.same_order(results)


packs = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),  # anything
    st.lists(st.just(1), min_size=1, max_size=20),  # one-token documents
    st.integers(1, 200).map(lambda n: [n]),  # one document
    st.tuples(st.integers(90, 160), st.lists(st.integers(1, 6), max_size=25)).map(lambda x: [x[0], *x[1]]),  # longer than a rank's share
    st.lists(st.integers(1, 4), min_size=20, max_size=60),  # many tiny ones
)


@pytest.mark.parametrize(("size", "ulysses"), SPLITS)
def test_exact_on_random_packs(cp, ranks, size, ulysses):
    heads = [h for h in HEADS if h[0] >= ulysses]

    @settings(deadline=None, max_examples=20 if size < 8 else 10, suppress_health_check=list(HealthCheck), database=None)
    @given(packs, st.sampled_from(heads), st.booleans(), st.integers(0, 1000))
    def run(lengths, h, causal, seed):
        check(cp, ranks, size, {
            "lengths": lengths, "heads": h[0], "kv_heads": h[1], "dim": 8, "causal": causal, "seed": seed, "ulysses": ulysses,
        })  # fmt: skip

    run()


@pytest.mark.parametrize(("size", "ulysses"), [(8, 8), (8, 4), (8, 1), (3, 3)])
def test_28_heads_over_any_number_of_ranks(cp, ranks, size, ulysses):
    """28 query and 4 key/value heads: 3 or 4 query heads a rank, key/value heads on two ranks each, gradients summed exactly."""
    check(cp, ranks, size, {
        "lengths": [97, 1, 30, 2, 41], "heads": 28, "kv_heads": 4, "dim": 8, "causal": True, "seed": 1, "ulysses": ulysses,
    })  # fmt: skip
