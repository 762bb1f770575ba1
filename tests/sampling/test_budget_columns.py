"""The plan of columns is the plan of every row; strategies can be registered."""

from __future__ import annotations

import doctest
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_sampling import STRATEGIES, Dropped, PlanColumns, VideoRequest, VisualPlan, plan, plan_many, register_strategy
from eagle_sampling.budget import strategies
from eagle_sampling.budget.share import share_frames

SMALL_CAPS = (4, 2, 1)


@st.composite
def row(draw):
    requests = []
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3, 6]))):
        wanted = draw(st.integers(1, 50))
        requests.append(VideoRequest(wanted, draw(st.integers(1, min(wanted, 9))), draw(st.sampled_from([3, 3, 4, 11]))))
    costs = draw(st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), max_size=4))
    return draw(st.integers(0, 40)), [sorted(image, reverse=True) for image in costs], requests


def assert_same(rows, max_tokens, caps, **options):
    result = plan_many(PlanColumns.from_rows(rows, caps=caps), max_tokens=max_tokens, caps=caps, **options)
    for i, (text, costs, requests) in enumerate(rows):
        assert result.row(i) == plan(text, costs, requests, max_tokens=max_tokens, caps=caps, **options)
    return result


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(row(), max_size=12), max_tokens=st.integers(0, 600), strategy=st.sampled_from(list(STRATEGIES)))
def test_row_by_row(rows, max_tokens, strategy):
    assert_same(rows, max_tokens, SMALL_CAPS, strategy=strategy)
    assert_same(rows, max_tokens, SMALL_CAPS, strategy=strategy, frames_per_video=7, cap=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("max_tokens", [2000, 8192, 32768])
def test_realistic_rows(strategy, max_tokens):
    rng = np.random.default_rng(max_tokens)
    rows = []
    for _ in range(1500):
        tiles = np.minimum(rng.integers(1, 13, rng.choice([0, 1, 1, 1, 3, 20]))[:, None], [12, 8, 6, 4, 2, 1])
        wanted = rng.integers(1, 3000, rng.choice([0, 0, 1, 2, 5])).tolist()
        requests = [VideoRequest(n, min(8, n), int(rng.integers(265, 280))) for n in wanted]
        rows.append((int(rng.integers(10, 2500)), (256 * (tiles + (tiles > 1)) + 6).tolist(), requests))
    result = assert_same(rows, max_tokens, (12, 8, 6, 4, 2, 1), strategy=strategy)
    assert (result.status == 0).sum() > 0
    assert (result.tokens <= max_tokens).all()


def test_numbers_too_large_for_int64_products():
    huge = [VideoRequest(10**9, 10**8, 10**6), VideoRequest(3 * 10**9, 7, 10**6), VideoRequest(5, 5, 1)]
    assert_same([(0, [], huge), (5, [], huge[1:])], 10**15, (1,))


@settings(deadline=None, max_examples=200)
@given(
    requests=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9), st.sampled_from([3, 4, 11])), min_size=1, max_size=6), data=st.data()
)
def test_the_matrix_shares_as_the_integers_do(requests, data):
    videos = [VideoRequest(max(wanted, minimum), minimum, each) for wanted, minimum, each in requests]
    least, most = (sum(getattr(v, name) * v.frame_tokens for v in videos) for name in ("minimum", "wanted"))
    room = data.draw(st.integers(least, most))
    planned = plan(0, [], videos, max_tokens=room)
    assert isinstance(planned, VisualPlan)
    assert list(planned.frames) == share_frames(videos, room)


@pytest.fixture
def smallest(monkeypatch):
    """The strategy of the example in `register_strategy`, which is run here; the table is restored afterwards."""
    monkeypatch.setitem(STRATEGIES, "smallest", None)
    del STRATEGIES["smallest"]
    example = doctest.DocTestFinder().find(strategies.register_strategy, "register_strategy", globs=vars(strategies).copy())[0]
    assert len(example.examples) == 5
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    return "smallest"


def test_a_registered_strategy_is_used_by_both(smallest):
    assert not STRATEGIES[smallest].by_rate
    rows = [(10, [[9, 5, 2]], [VideoRequest(9, 3, 5)]), (40, [[9, 5, 2]], [VideoRequest(9, 3, 5)]), (60, [], [])]
    result = assert_same(rows, 50, SMALL_CAPS, strategy=smallest)
    assert result.row(0) == VisualPlan(1, (1,), (3,), 27, ("frames 9->3", "tiles 4->1"))
    assert result.row(1) == Dropped("too_long", "frames and images need 17 tokens, 10 of 50 tokens are left after 40 of text")
    assert result.row(2) == Dropped("text_too_long", "text alone is 60 tokens, the budget is 50")


def test_a_name_is_registered_once():
    for name, strategy in list(STRATEGIES.items()):
        with pytest.raises(ValueError, match=f"'{name}' is registered already"):
            register_strategy(name, functools.partial(strategy.choose))
        register_strategy(name, strategy.choose, by_rate=strategy.by_rate)
        assert STRATEGIES[name] == strategy


def test_arrays_of_the_result():
    columns = PlanColumns.from_rows(
        [
            (10, [[30, 20, 10], [30, 20, 10]], []),
            (100, [], [VideoRequest(9, 3, 5)]),
            (0, [], [VideoRequest(9, 3, 5), VideoRequest(2, 1, 5)]),
            (0, [], []),
        ],
        caps=SMALL_CAPS,
    )
    result = plan_many(columns, max_tokens=50, caps=SMALL_CAPS)
    assert result.status.tolist() == [0, 1, 0, 0]
    assert result.cap_index.tolist() == [1, -1, 0, 0]
    assert result.image_cap_index.tolist() == [1, 1]
    assert result.frames.tolist() == [0, 8, 2]
    assert result.tokens.tolist() == [50, 0, 50, 0]
    assert (result.status.dtype, result.cap_index.dtype, result.image_cap_index.dtype) == (np.int8, np.int8, np.int8)
    with pytest.raises(IndexError, match="row 4 of 4"):
        result.row(4)


def test_no_rows():
    for strategy in STRATEGIES:
        result = plan_many(PlanColumns.from_rows([]), max_tokens=10, strategy=strategy)
        assert len(result.status) == len(result.tokens) == 0


def test_any_integer_width():
    def columns(dtype):
        return PlanColumns(
            text_tokens=np.array([3, 4], dtype),
            image_offsets=np.array([0, 1, 1], dtype),
            image_tokens=np.array([[9, 5, 2]], dtype),
            video_offsets=np.array([0, 0, 2], dtype),
            wanted=np.array([120, 90], dtype),
            minimum=np.array([8, 8], dtype),
            frame_tokens=np.array([100, 90], dtype),
        )

    expected = [plan_many(columns(np.int64), max_tokens=9000, caps=SMALL_CAPS).row(i) for i in range(2)]
    for dtype in (np.uint8, np.int32, np.uint64):
        result = plan_many(columns(dtype), max_tokens=9000, caps=SMALL_CAPS)
        assert [result.row(i) for i in range(2)] == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_offsets": [0, 2]}, "image_offsets"),
        ({"video_offsets": [0, 0]}, "video_offsets"),
        ({"video_offsets": [1, 1]}, "video_offsets"),
        ({"minimum": [1, 2]}, "as many"),
        ({"minimum": [9]}, "row 0, video 0: wanted = 5, minimum = 9"),
        ({"frame_tokens": [0]}, "frame_tokens = 0"),
        ({"text_tokens": [-4]}, "row 0"),
        ({"text_tokens": [0.5]}, "float64"),
        ({"image_tokens": [1, 2, 3]}, "image_tokens has shape"),
    ],
)
def test_refusals(change, words):
    good = {
        "text_tokens": [1],
        "image_offsets": [0, 1],
        "image_tokens": [[3, 2, 1]],
        "video_offsets": [0, 1],
        "wanted": [5],
        "minimum": [1],
        "frame_tokens": [2],
    }
    PlanColumns(**good)
    with pytest.raises(ValueError, match=words):
        PlanColumns(**(good | change))


def test_options_are_checked():
    columns = PlanColumns.from_rows([(1, [[3, 2, 1]], [])], caps=SMALL_CAPS)
    with pytest.raises(ValueError, match=r"need \[images, 6\]"):
        plan_many(columns, max_tokens=10)
    with pytest.raises(ValueError, match="unknown"):
        plan_many(columns, max_tokens=10, caps=SMALL_CAPS, strategy="adz")
