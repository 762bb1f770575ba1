"""ADS on one sample: Eq. (2) against a search over all plans, on cases small enough to search."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eagle_sampling import CAPS, STRATEGIES, Dropped, VideoRequest, VisualPlan, plan, tile_caps

SMALL_CAPS = (4, 2, 1)
K = 256


@st.composite
def video(draw, most=7, tokens=(1, 2, 3, 5)):
    wanted = draw(st.integers(1, most))
    return VideoRequest(wanted, draw(st.integers(1, wanted)), draw(st.sampled_from(tokens)))


image = st.lists(st.integers(0, 12), min_size=3, max_size=3).map(lambda costs: sorted(costs, reverse=True))
images = st.lists(image, max_size=3)
videos = st.lists(video(), max_size=3)


def least(costs):
    return sum(row[-1] for row in costs)


def allotments(requests, room):
    """All ways to give every video between its minimum and what it wants, within `room`."""
    ranges = [range(v.minimum, v.wanted + 1) for v in requests]
    for frames in product(*ranges):
        if sum(n * v.frame_tokens for n, v in zip(frames, requests)) <= room:
            yield frames


def share(requests, room):
    """The rule of `ads` from its docstring: the real x between the points at which a video leaves its minimum, then single frames."""
    total = lambda x: sum(v.frame_tokens * max(Fraction(v.minimum), x * v.wanted) for v in requests)
    points = sorted({Fraction(v.minimum, v.wanted) for v in requests} | {Fraction(0), Fraction(1)})
    start = max(point for point in points if total(point) <= room)
    slope = sum(v.frame_tokens * v.wanted for v in requests if start * v.wanted >= v.minimum)
    x = min(Fraction(1), start + (room - total(start)) / slope) if slope else start
    real = [max(Fraction(v.minimum), x * v.wanted) for v in requests]
    frames = [int(r) for r in real]
    left = room - sum(n * v.frame_tokens for n, v in zip(frames, requests))
    lifted = [x * v.wanted < v.minimum for v in requests]
    order = sorted(range(len(requests)), key=lambda i: (lifted[i], -(real[i] - frames[i]), i))
    while True:
        before = list(frames)
        for i in order:
            if frames[i] < requests[i].wanted and requests[i].frame_tokens <= left:
                frames[i] += 1
                left -= requests[i].frame_tokens
        if frames == before:
            return tuple(frames)


@settings(deadline=None, max_examples=400)
@given(text=st.integers(0, 20), images=images, videos=videos, max_tokens=st.integers(0, 90))
def test_ads_is_eq_2(text, images, videos, max_tokens):
    result = plan(text, images, videos, max_tokens=max_tokens, caps=SMALL_CAPS)
    room = max_tokens - text - least(images)
    possible = list(allotments(videos, room)) if room >= 0 else []
    if isinstance(result, Dropped):
        assert not possible, "something fits"
        assert result.reason == ("text_too_long" if text > max_tokens else "images_too_long" if room < 0 else "too_few_frames")
        return
    # Phase 1: with images at the last cap, one of the possible allotments, and no single frame more fits.
    assert result.frames in possible
    for i in range(len(videos)):
        assert (*result.frames[:i], result.frames[i] + 1, *result.frames[i + 1 :]) not in possible
    if len({v.frame_tokens for v in videos}) <= 1:
        assert sum(result.frames) == max(map(sum, possible)), "n* is the most frames that fit"
    assert result.frames == (share(videos, room) if videos else ())
    # Phase 2: the largest cap that fits next to the frames.
    spent = text + sum(n * v.frame_tokens for n, v in zip(result.frames, videos))
    at = {cap: spent + sum(row[c] for row in images) for c, cap in enumerate(SMALL_CAPS)}
    assert result.cap == max(cap for cap in SMALL_CAPS if at[cap] <= max_tokens)
    assert result.image_caps == (result.cap,) * len(images)
    assert result.tokens == at[result.cap] <= max_tokens


@settings(deadline=None, max_examples=200)
@given(requests=st.lists(video(most=40, tokens=(7,)), min_size=2, max_size=5), data=st.data())
def test_equal_frames_are_shared_in_proportion(requests, data):
    least, most = (7 * sum(getattr(v, name) for v in requests) for name in ("minimum", "wanted"))
    assume(least < most)
    room = data.draw(st.integers(least, most - 1))
    result = plan(0, [], requests, max_tokens=room)
    assert isinstance(result, VisualPlan)
    assert sum(result.frames) == room // 7
    # Among videos above their minimum, no move of one frame to another video is closer to proportion.
    for i, j in product(range(len(requests)), repeat=2):
        a, b = requests[i], requests[j]
        if result.frames[i] > a.minimum and result.frames[j] < b.wanted:
            assert Fraction(result.frames[i] - 1, a.wanted) < Fraction(result.frames[j] + 1, b.wanted)


@settings(deadline=None, max_examples=300)
@given(text=st.integers(0, 20), images=images, videos=videos, max_tokens=st.integers(0, 90))
def test_fill_raises_until_nothing_fits(text, images, videos, max_tokens):
    ads = plan(text, images, videos, max_tokens=max_tokens, caps=SMALL_CAPS)
    filled = plan(text, images, videos, max_tokens=max_tokens, caps=SMALL_CAPS, strategy="ads-fill")
    if isinstance(ads, Dropped):
        assert filled == ads
        return
    assert isinstance(filled, VisualPlan)
    assert (filled.cap, filled.frames) == (ads.cap, ads.frames)
    assert ads.tokens <= filled.tokens <= max_tokens
    columns = [SMALL_CAPS.index(cap) for cap in filled.image_caps]
    spent = text + sum(n * v.frame_tokens for n, v in zip(filled.frames, videos))
    assert filled.tokens == spent + sum(row[c] for row, c in zip(images, columns))
    for row, c in zip(images, columns):
        assert SMALL_CAPS[c] >= filled.cap
        for higher in range(c):
            gain = row[higher] - row[c]
            assert gain == 0 or filled.tokens + gain > max_tokens, "a further raise fits"


def test_fill_takes_the_most_expensive_raise_first():
    costs = [[9, 5, 1], [7, 5, 1], [4, 2, 1]]
    assert plan(0, costs, [], max_tokens=11, caps=SMALL_CAPS, strategy="ads") == VisualPlan(1, (1, 1, 1), (), 3, ("tiles 4->1",))
    filled = plan(0, costs, [], max_tokens=11, caps=SMALL_CAPS, strategy="ads-fill")
    assert filled == VisualPlan(1, (4, 1, 1), (), 11, ("tiles 4->1 (1 of 3 images higher)",))
    filled = plan(0, costs, [], max_tokens=14, caps=SMALL_CAPS, strategy="ads-fill")
    assert filled == VisualPlan(2, (2, 4, 2), (), 14, ("tiles 4->2 (1 of 3 images higher)",))


@settings(deadline=None, max_examples=200)
@given(
    text=st.integers(0, 20),
    images=images,
    videos=videos,
    max_tokens=st.integers(0, 120),
    most=st.integers(1, 9),
    cap=st.sampled_from([None, *SMALL_CAPS]),
)
def test_uniform_is_fixed_or_dropped(text, images, videos, max_tokens, most, cap):
    result = plan(text, images, videos, max_tokens=max_tokens, caps=SMALL_CAPS, strategy="uniform", frames_per_video=most, cap=cap)
    frames = tuple(min(v.wanted, most) for v in videos)
    column = SMALL_CAPS.index(cap or SMALL_CAPS[0])
    tokens = text + sum(row[column] for row in images) + sum(n * v.frame_tokens for n, v in zip(frames, videos))
    if tokens <= max_tokens:
        assert isinstance(result, VisualPlan)
        assert (result.cap, result.frames, result.tokens) == (SMALL_CAPS[column], frames, tokens)
    else:
        assert isinstance(result, Dropped)
        assert result.reason == ("text_too_long" if text > max_tokens else "too_long")


def iap_costs(most):
    return [K * (min(most, cap) + (min(most, cap) > 1)) + 6 for cap in CAPS]


@pytest.mark.parametrize(
    ("text", "images", "videos", "expected"),
    [
        # A five-minute video at 2 frames per second in 58 000 tokens: 212 of 600.
        (300, [], [(600, 8, 272)], VisualPlan(12, (), (212,), 300 + 212 * 272, ("frames 600->212",))),
        # All fits: nothing is given up.
        (100, [iap_costs(12)], [(8, 8, 272)], VisualPlan(12, (12,), (8,), 100 + 13 * K + 6 + 8 * 272, ())),
        # A document of 30 pages and its figure: pages first, the figure gets the rest.
        (100, [iap_costs(12)] * 15, [(30, 8, 260)], None),
        # Text alone.
        (58000, [], [], VisualPlan(12, (), (), 58000, ())),
    ],
)
def test_as_in_the_paper(text, images, videos, expected):
    result = plan(text, images, [VideoRequest(*v) for v in videos], max_tokens=58000)
    assert isinstance(result, VisualPlan)
    if expected is not None:
        assert result == expected
    else:
        assert result.frames == (30,)
        assert result.cap == 12


def test_images_give_tiles_before_a_video_gives_frames():
    # 40 frames cost 10 880; of 16 384 the images keep what is left: cap 2 of two images is 2 * 774, cap 4 would be 2 * 1 286.
    result = plan(3500, [iap_costs(12)] * 2, [VideoRequest(40, 8, 272)], max_tokens=16384)
    assert result == VisualPlan(2, (2, 2), (40,), 3500 + 40 * 272 + 2 * 774, ("tiles 12->2",))


def test_a_lower_cap_that_costs_nothing_is_not_a_degradation():
    result = plan(0, [iap_costs(1), iap_costs(2)], [], max_tokens=262 + 774)
    assert isinstance(result, VisualPlan)
    assert result.degradations == ()
    result = plan(0, [iap_costs(1), iap_costs(2)], [], max_tokens=2 * 262)
    assert isinstance(result, VisualPlan)
    assert result.degradations == ("tiles 12->1",)


def test_degradations_name_the_video():
    result = plan(0, [], [VideoRequest(60, 8, 10), VideoRequest(20, 8, 10), VideoRequest(3, 3, 10)], max_tokens=400)
    assert isinstance(result, VisualPlan)
    assert result.frames == (28, 9, 3)
    assert result.degradations == ("video 1 frames 60->28", "video 2 frames 20->9")


@pytest.mark.parametrize(
    ("text", "images", "videos", "reason", "numbers"),
    [
        (1001, [], [], "text_too_long", ["1001", "1000"]),
        (500, [[262] * 6] * 2, [], "images_too_long", ["2 images", "524", "500 of 1000"]),
        (500, [[100] * 6], [(20, 8, 60)], "too_few_frames", ["8", "480", "the images 100", "500 of 1000"]),
    ],
)
def test_details_of_drops_have_the_numbers(text, images, videos, reason, numbers):
    result = plan(text, images, [VideoRequest(*v) for v in videos], max_tokens=1000)
    assert isinstance(result, Dropped)
    assert result.reason == reason
    for number in numbers:
        assert number in result.detail


def test_exact_fits():
    assert isinstance(plan(1000, [], [], max_tokens=1000), VisualPlan)
    assert isinstance(plan(0, [[500] * 6] * 2, [], max_tokens=1000), VisualPlan)
    assert isinstance(plan(40, [[160] * 6], [VideoRequest(20, 8, 100)], max_tokens=1000), VisualPlan)
    assert isinstance(plan(41, [[160] * 6], [VideoRequest(20, 8, 100)], max_tokens=1000), Dropped)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": "ads_fill"}, "ads, ads-fill, uniform"),
        ({"caps": (1, 2)}, "falling"),
        ({"caps": (2, 0)}, "none below 1"),
        ({"images": [[1, 2, 3]]}, r"\(1, 3\): need \[images, 6\]"),
        ({"images": [1, 2, 3, 4, 5, 6]}, r"\(6,\)"),
        ({"images": [[-1] * 6]}, "negative"),
        ({"images": [[1.5] * 6]}, "float64"),
        ({"videos": [VideoRequest(5, 6, 1)]}, "minimum = 6"),
        ({"videos": [VideoRequest(5, 0, 1)]}, "minimum = 0"),
        ({"videos": [VideoRequest(5, 1, 0)]}, "frame_tokens = 0"),
        ({"text_tokens": -1}, "negative"),
        ({"strategy": "uniform", "cap": 7}, "cap = 7"),
        ({"strategy": "uniform", "frames_per_video": 0}, "frames_per_video = 0"),
        ({"videos": [VideoRequest(2**62, 1, 4)]}, "wanted \\* frame_tokens is 1.84e\\+19 at index 0: more than 2\\^62"),
        ({"images": [[2**62] * 6] * 4}, "image_tokens is 4.61e\\+18 at index 0"),
        ({"max_tokens": 2**63}, "max_tokens = 9223372036854775808: need at most"),
        ({"videos": [(10, 1, 2, 3)]}, r"a video is \(10, 1, 2, 3\): need a VideoRequest"),
        ({"videos": VideoRequest(10, 1, 5)}, "a video is 10: need a VideoRequest"),
        ({"images": [[]]}, r"\(1, 0\): need \[images, 6\]"),
    ],
)
def test_refusals(change, words):
    arguments = {"text_tokens": 1, "images": [], "videos": [], "max_tokens": 10} | change
    with pytest.raises(ValueError, match=words):
        plan(arguments.pop("text_tokens"), arguments.pop("images"), arguments.pop("videos"), **arguments)


def test_strategies_are_named():
    assert tuple(STRATEGIES)[:3] == ("ads", "ads-fill", "uniform"), "others may be registered after them"
    assert [strategy.by_rate for strategy in STRATEGIES.values()][:3] == [True, True, False]
    assert CAPS == (12, 8, 6, 4, 2, 1)


def test_tile_caps():
    assert tile_caps(1, 12) == CAPS
    assert tile_caps(1, 9) == (9, 8, 6, 4, 2, 1)
    assert tile_caps(3, 6) == (6, 4)
    assert tile_caps(5, 5) == (5,)
    assert tile_caps(1, 40) == (40, *CAPS)
    for limits in ((0, 12), (7, 6)):
        with pytest.raises(ValueError, match="1 <= min_tiles <= max_tiles"):
            tile_caps(*limits)


@pytest.mark.parametrize("option", [{"max_tokens": 1.5}, {"frames_per_video": 1.5}, {"caps": (1.5,)}])
def test_options_are_whole_numbers(option):
    with pytest.raises(TypeError, match=r"= 1.5: need a whole number"):
        plan(1, [], [], **({"max_tokens": 10} | option))


@pytest.mark.parametrize("limits", [(1.5, 3), (1, 12.5)])
def test_tile_caps_are_whole_numbers(limits):
    with pytest.raises(TypeError, match="need a whole number"):
        tile_caps(*limits)
