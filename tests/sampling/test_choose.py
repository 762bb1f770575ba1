"""Frame and page selection: laws of the choice; a time table is exact for all ticks."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_sampling import TimeTable, choose_chapters, choose_pages, choose_times, clip_range, wanted_frames

increasing = st.lists(st.integers(1, 400), min_size=1, max_size=80).map(lambda steps: np.cumsum(steps) / 100)


@settings(deadline=None, max_examples=300)
@given(increasing, st.data(), st.sampled_from(["linspace", "center"]))
def test_chosen_times_are_true_different_and_in_order(times, data, placement):
    count = data.draw(st.integers(1, len(times)))
    chosen = choose_times(times, count, placement=placement)
    assert len(chosen) == count
    assert np.isin(chosen, times).all()
    assert (np.diff(chosen) > 0).all()
    if placement == "linspace" and count > 1:
        assert chosen[0] == times[0]
        assert chosen[-1] == times[-1]
    if count == len(times):
        assert (chosen == times).all()


@settings(deadline=None, max_examples=300)
@given(increasing, st.floats(0, 50), st.floats(0.01, 50))
def test_a_clip_is_what_is_on_the_screen(times, start, length):
    end = start + length
    try:
        first, stop = clip_range(times, start, end)
    except ValueError:
        assert start > times[-1] or end <= times[0]
        return
    shown = [i for i in range(len(times)) if times[i] < end - 1e-6 and (i + 1 == len(times) or times[i + 1] > start + 1e-6)]
    assert list(range(first, stop)) == (shown or [first])


def test_constant_rate_by_hand():
    times = np.arange(300) / 30
    assert choose_times(times, 4).tolist() == pytest.approx([0, 100 / 30, 199 / 30, 299 / 30], abs=0.034)
    assert choose_times(times, 2, start=2.0, end=4.0).tolist() == pytest.approx([2.0, 119 / 30])
    assert choose_times(times, 2, placement="center").tolist() == pytest.approx([2.5, 7.5])
    assert choose_times(TimeTable.from_ticks(range(10), Fraction(1, 10)), 1).tolist() == [0.0]


def test_even_in_time_not_in_frame_number():
    """Two seconds at 50 per second, then 100 s at 1: half of the frames are in the dense part, and one of eight chosen ones."""
    times = np.concatenate([np.arange(100) / 50, 2 + np.arange(100)])
    assert (choose_times(times, 8) < 2).sum() == 1


@pytest.mark.parametrize(("count", "message"), [(0, "at least 1"), (11, "choose at most 10")])
def test_invalid_counts(count, message):
    with pytest.raises(ValueError, match=message):
        choose_times(np.arange(10.0), count)


def test_invalid_clips():
    for start, end in ((5, 5), (6, 5), (50, 60), (None, -1)):
        with pytest.raises(ValueError, match="clip"):
            choose_times(np.arange(10.0), 1, start=start, end=end)
    with pytest.raises(ValueError, match="no frames"):
        choose_times([], 1)
    with pytest.raises(ValueError, match="placement"):
        choose_times([0.0], 1, placement="middle")


def test_wanted_frames():
    assert [wanted_frames(duration) for duration in (0, 0.3, 1, 1.49, 10.0, 3600)] == [1, 1, 2, 2, 20, 7200]
    assert wanted_frames(100, fps=2, max_frames=50) == 50
    assert wanted_frames(1, min_frames=8) == 8
    assert wanted_frames(1, min_frames=8, available=5) == 5
    assert wanted_frames(1, min_frames=8, max_frames=4) == 4
    assert wanted_frames(100, fps=1e300, available=30) == wanted_frames(1e300, fps=1e300, available=30) == 30
    assert type(wanted_frames(10.0)) is type(wanted_frames(10.0, available=np.int64(7))) is int


def test_without_a_rate_all_are_wanted():
    assert wanted_frames(float("nan"), available=30) == 30
    assert wanted_frames(float("nan"), available=30, max_frames=12) == 12
    assert wanted_frames(float("nan"), available=3, min_frames=8) == 3
    assert wanted_frames(5.0, fps=None, available=150, max_frames=32) == 32


@settings(deadline=None, max_examples=200)
@given(
    videos=st.lists(st.tuples(st.one_of(st.floats(0, 1e5), st.just(float("nan"))), st.integers(1, 10**6)), max_size=20),
    fps=st.sampled_from([None, 0.3, 1.0, 2.0, 29.97]),
    min_frames=st.integers(1, 40),
    max_frames=st.one_of(st.none(), st.integers(1, 5000)),
)
def test_wanted_frames_of_columns_are_those_of_each_video(videos, fps, min_frames, max_frames):
    seconds, available = np.array([video[0] for video in videos]), np.array([video[1] for video in videos], np.int64)
    wanted = wanted_frames(seconds, fps, max_frames, min_frames=min_frames, available=available)
    assert (wanted.dtype, wanted.shape) == (np.int64, (len(videos),))
    for (duration, there), count in zip(videos, wanted.tolist()):
        assert count == wanted_frames(duration, fps, max_frames, min_frames=min_frames, available=there)
        expected = there if fps is None or np.isnan(duration) else max(int(duration * fps + 1e-6), min_frames)
        assert count == min(expected, there, max_frames or there)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"duration": -1}, "seconds >= 0"),
        ({"duration": float("nan")}, "with available: no rate"),
        ({"duration": float("inf"), "available": 3}, "not inf"),
        ({"duration": np.array([1.0, -2.0])}, "not -2"),
        ({"duration": 1, "fps": 0}, "fps must be positive"),
        ({"duration": 1, "fps": None}, "give available"),
        ({"duration": 1, "max_frames": 0}, "max_frames must be at least 1"),
        ({"duration": 1, "min_frames": 0}, "min_frames must be at least 1"),
        ({"duration": 1, "min_frames": float("nan")}, "min_frames must be a whole number of at least 1, not nan"),
        ({"duration": 1, "max_frames": 1.5}, "max_frames must be a whole number"),
        ({"duration": 1, "available": 2.5}, "available must be a whole number"),
        ({"duration": np.array([1.0, 1.0]), "available": np.array([1, 0])}, "available must be at least 1, not 0"),
    ],
)
def test_wanted_frames_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        wanted_frames(**arguments)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 10**6).flatmap(lambda available: st.tuples(st.just(available), st.integers(1, min(available, 3000)))))
def test_chosen_pages_are_even_and_different(pages):
    available, count = pages
    chosen = choose_pages(available, count)
    assert (chosen.dtype, chosen.shape) == (np.int64, (count,))
    assert chosen[0] == 0
    assert (np.diff(chosen) > 0).all()
    if count > 1:
        assert chosen[-1] == available - 1
        assert np.abs(chosen * (count - 1) - np.arange(count) * (available - 1)).max() * 2 <= count - 1, "each is the nearest page"


def test_chosen_pages_by_hand():
    assert choose_pages(4, 4).tolist() == [0, 1, 2, 3]
    assert choose_pages(30, 5).tolist() == [0, 7, 14, 22, 29]
    assert choose_pages(30, 1).tolist() == [0]
    for count in (0, 31, -1):
        with pytest.raises(ValueError, match=f"{count} of 30 pages"):
            choose_pages(30, count)


def test_chapters():
    times = np.arange(3000) / 30
    chapters = choose_chapters(times, [(0, 10), (10, 90), (90, 90.1)])
    assert [len(chapter) for chapter in chapters] == [20, 50, 1]
    assert chapters[0].max() < 10 <= chapters[1].min()
    beyond = choose_chapters(times[:300], [(0, 100), (9, 60), (-5, 1)])  # ten seconds: the part outside has no frames
    assert [len(chapter) for chapter in beyond] == [20, 2, 2]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(-1000, 1000), st.sampled_from([Fraction(1, 1000), Fraction(1, 90000)]))
def test_a_time_table_is_exact(steps, start, unit):
    ticks = start + np.cumsum(steps, dtype=np.int64)
    table = TimeTable.from_ticks(ticks, unit)
    assert (table.ticks() == ticks).all()
    assert len(table) == len(ticks)
    again = TimeTable.from_list(table.to_list())
    assert again == table
    assert all(type(value) is int for value in table.to_list())
    assert table.times().tolist() == [tick * unit.numerator / unit.denominator for tick in ticks.tolist()]
    assert np.asarray(table).tolist() == list(table) == table[:].tolist() == table.times().tolist()
    assert np.asarray(table, np.float32).dtype == np.float32
    if len(ticks):
        assert table[-1] == table.times()[-1]


@pytest.mark.parametrize(
    "rate", [Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, Fraction(60000, 1001), 60, 15, Fraction(27, 2)]
)
def test_a_constant_rate_is_one_run_however_it_is_rounded(rate):
    for unit in (Fraction(1, 1000), Fraction(1, 90000)):
        for add in (Fraction(0), Fraction(1, 2)):  # rounded down, and to the nearest
            ticks = [int(Fraction(i) / rate / unit + add) for i in range(5000)]
            table = TimeTable.from_ticks(ticks, unit)
            assert table.constant, (rate, unit)
            assert table.ticks().tolist() == ticks


def test_invalid_tables():
    with pytest.raises(ValueError, match="in order"):
        TimeTable.from_ticks([3, 2], Fraction(1))
    with pytest.raises(ValueError, match="positive"):
        TimeTable.from_ticks([1], Fraction(0))
    for wrong in ([], [1], [1, 1000, 0], [0, 1], [1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 2, 2]):
        with pytest.raises(ValueError):
            TimeTable.from_list(wrong)


@pytest.mark.parametrize("choose", [lambda times: choose_times(times, 2), clip_range, lambda times: choose_chapters(times, [(0, 1)])])
@pytest.mark.parametrize(
    ("times", "at"), [([0.0, float("nan"), 1.0], 1), ([0.0, 1.0, float("inf")], 2), ([2.0, 1.0, 0.0], 1), ([0.0, 2.0, 1.0], 2)]
)
def test_times_that_are_not_finite_or_not_in_order_are_refused(choose, times, at):
    with pytest.raises(ValueError, match=rf"finite seconds in rising order, but times\[{at}\] is"):
        choose(times)


@pytest.mark.parametrize("border", ["start", "end"])
def test_a_border_that_is_nan_is_refused(border):
    with pytest.raises(ValueError, match=f"the clip's {border} is NaN"):
        choose_times([0.0, 1.0], 1, **{border: float("nan")})


def test_counts_are_whole_numbers():
    with pytest.raises(TypeError, match=r"count = 1.5: need a whole number"):
        choose_times([0.0, 1.0], 1.5)
    with pytest.raises(TypeError, match=r"available = 5.5: need a whole number"):
        choose_pages(5.5, 2)


@pytest.mark.parametrize("ticks", [[1.5], np.array([1.5, 2.5]), [[1, 2]], ["a"]])
def test_ticks_are_integers(ticks):
    with pytest.raises(ValueError, match="need a list of integers"):
        TimeTable.from_ticks(ticks, Fraction(1))


@pytest.mark.parametrize(("values", "words"), [([1.5, 2], "a list of integers"), ([1, 1, 0, 2, -5, 1, 0], "step not negative")])
def test_lists_that_no_table_makes(values, words):
    with pytest.raises(ValueError, match=words):
        TimeTable.from_list(values)
