"""Timing in turn: order, warm-up, pairs, medians. A counter takes the place of the clock."""

import pytest

from benchmarks.timing import interleaved_seconds, medians, quartiles, ratios


def test_contenders_take_turns_and_the_order_rotates():
    order: list[str] = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleaved_seconds(contenders, 3, warmup=2)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab"]


def test_each_sample_is_the_time_of_its_own_call():
    now = [0.0]
    costs = {"slow": iter([100.0, 3.0, 5.0]), "fast": iter([100.0, 1.0, 2.0])}  # the first is the warm-up

    def advance(name: str) -> None:
        now[0] += next(costs[name])

    samples = interleaved_seconds({name: lambda name=name: advance(name) for name in costs}, 2, clock=lambda: now[0])
    assert samples == {"slow": [3.0, 5.0], "fast": [1.0, 2.0]}
    assert medians(samples) == {"slow": 4.0, "fast": 1.5}
    assert ratios(samples["slow"], samples["fast"]) == [3.0, 2.5]


def test_quartiles():
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_bad_input():
    with pytest.raises(ValueError, match="0 contenders and 1 rounds"):
        interleaved_seconds({}, 1)
    with pytest.raises(ValueError, match="1 contenders and 0 rounds"):
        interleaved_seconds({"a": int}, 0)
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])
