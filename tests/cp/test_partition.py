"""Every token is on one rank, ranks hold equal tokens, and work is balanced with few shared documents."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_cp.heads import split_heads
from eagle_cp.partition import partition


def covered(parts, lengths):
    """Checks that pieces tile every document; returns tokens and work of each rank, counted here."""
    cover = {d: [] for d in range(len(lengths))}
    tokens, work = [], []
    for documents in parts.ranks:
        spans = [(p.document, p.start, p.stop) for p in documents.pieces] + [(d, 0, lengths[d]) for d in documents.whole]
        for d, a, b in spans:
            assert 0 <= a < b <= lengths[d]
            cover[d].append((a, b))
        tokens.append(sum(b - a for _, a, b in spans))
        work.append(sum(sum(range(a + 1, b + 1)) for _, a, b in spans))
        assert list(documents.pieces) == sorted(documents.pieces)
        assert {p.document for p in documents.pieces} <= set(parts.cut)
    for d, spans in cover.items():
        spans.sort()
        assert spans[0][0] == 0
        assert spans[-1][1] == lengths[d]
        assert all(x[1] == y[0] for x, y in itertools.pairwise(spans)), spans
    return tokens, work


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 16))
def test_every_token_once_and_tokens_equal(lengths, ranks):
    parts = partition(lengths, ranks)
    tokens, work = covered(parts, lengths)
    assert max(tokens) - min(tokens) <= 1
    assert tuple(work) == parts.work
    for documents in parts.ranks:  # a front and a back piece at most, so a rank gets a key at most twice
        cut = [p.document for p in documents.pieces]
        assert max((cut.count(d) for d in cut), default=0) <= 2


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 16))
def test_whole_documents_are_spread(lengths, ranks):
    parts = partition(lengths, ranks, whole=True)
    tokens, work = covered(parts, lengths)
    assert parts.cut == ()
    assert tokens == parts.rank_tokens(lengths)
    assert tuple(work) == parts.work
    # The rank with the largest share got its last document when it had the smallest one.
    shares = [t / sum(lengths) + w / sum(work) for t, w in zip(tokens, work)]
    longest = max(lengths)
    assert max(shares) <= 2 / ranks + longest / sum(lengths) + longest * (longest + 1) / 2 / sum(work) + 1e-9


def realistic(kind, seed):
    draw = random.Random(seed)
    if kind == "log-normal":
        return [min(int(draw.lognormvariate(7.5, 1.2)) + 1, 32768) for _ in range(60)]
    if kind == "video and short":
        return [131072] + [draw.randint(50, 900) for _ in range(200)]
    if kind == "equal":
        return [4096] * 32
    if kind == "one":
        return [131071]
    return [draw.randint(1, 60) for _ in range(2000)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("kind", ["log-normal", "video and short", "equal", "one", "tiny"])
def test_work_within_5_percent_on_realistic_packs(kind, ranks):
    for seed in range(5):
        lengths = realistic(kind, seed)
        parts = partition(lengths, ranks)
        assert parts.imbalance <= 0.05, (kind, ranks, seed, parts.imbalance)


def test_short_documents_stay_whole():
    assert partition([4096] * 32, 8).cut == ()
    lengths = realistic("video and short", 0)
    assert partition(lengths, 8).cut == (0,)
    for seed in range(5):  # one cut document compensates what 60 others leave uneven on two ranks
        assert len(partition(realistic("log-normal", seed), 2).cut) <= 2


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 64))
def test_heads_are_covered_and_grouped(kv_heads, group, ulysses):
    heads = kv_heads * group
    if ulysses > heads:
        with pytest.raises(ValueError, match="nearest split"):
            split_heads(heads, kv_heads, ulysses)
        return
    shares = split_heads(heads, kv_heads, ulysses)
    assert [s.q0 for s in shares] + [heads] == [0] + [s.q1 for s in shares]
    assert max(s.num_q for s in shares) - min(s.num_q for s in shares) <= 1
    for s in shares:
        for chunks in (s.chunks, s.headwise):
            assert [c.q0 for c in chunks] + [s.num_q] == [0] + [c.q1 for c in chunks]
            for c in chunks:
                for i, q in enumerate(range(c.q0, c.q1)):  # the kernel's grouping is the model's
                    kernel = c.k0 + i * (c.k1 - c.k0) // (c.q1 - c.q0)
                    assert s.k0 + kernel == (s.q0 + q) // group


def test_heads_that_do_not_group():
    with pytest.raises(ValueError, match=r"28 query heads can't share 5 .* nearest number that works is 4"):
        split_heads(28, 5, 2)
