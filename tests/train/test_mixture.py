"""Mixtures of sources: shares by weight, temperature and tokens, every row equally often, and draws that can be counted."""

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eagle_model.visual import VisualSpec
from eagle_train.config import Config, ConfigError, MixtureConfig, StageConfig, dump_config, parse_config
from eagle_train.data.facts import FactsSource
from eagle_train.data.recipe import recipe_of
from eagle_train.planning.draws import choose_rows
from eagle_train.planning.mixture import Pool, draw, targets
from eagle_train.planning.stages import StageSchedule, plan_stage
from eagle_train.planning.visual import plan_visual

SPEC = VisualSpec()


def stage(**fields):
    return StageConfig(**{"name": "s", "max_tokens": 4096, "packs_per_step": 4, **fields})


def sources(**rows):
    """rows: number of rows, or (number, repeat_time, weight)."""
    result, first = [], 0
    for name, entry in rows.items():
        count, repeat_time, weight = entry if isinstance(entry, tuple) else (entry, 1.0, 1.0)
        result.append(FactsSource(name, Path(f"{name}.jsonl"), Path("."), first, count, 0, repeat_time, weight, None))
        first += count
    return result


def pool(costs, name="a", weight=1.0):
    return Pool(name, weight, np.arange(len(costs)), np.asarray(costs, np.int64))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(0, 5000),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
)
def test_rows_of_a_source_are_drawn_equally_often(costs, target, seed, epochs):
    one = pool(costs)
    drawn = [draw(one, target, seed, epoch) for epoch in range(max(epochs) + 1)]
    for rows in drawn:  # an epoch has its tokens, to less than a row's
        assert abs(one.costs[rows].sum() - target) < max(costs)
    times = np.bincount(np.concatenate(drawn), minlength=len(costs))
    assert times.max() - times.min() <= 1
    total = one.costs[np.concatenate(drawn)].sum()  # and errors don't add up over epochs
    assert abs(total - target * len(drawn)) < max(costs)
    for epoch in epochs:  # any epoch alone, without those before it
        assert np.array_equal(draw(one, target, seed, epoch), drawn[epoch])


def test_a_pass_has_an_order_of_its_own():
    one = pool([1] * 100)
    first, second, other = draw(one, 10, 3, 0), draw(one, 10, 3, 10), draw(one, 10, 4, 0)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=6), st.floats(0.2, 50), st.integers(1, 10**12))
def test_temperature_is_a_power_of_the_size(sizes, temperature, whole):
    pools = [pool([size], name=str(number)) for number, size in enumerate(sizes)]
    found = targets(pools, MixtureConfig(temperature=temperature, size=whole))
    scores = np.array(sizes, np.float64) ** (1 / temperature)
    assert found == pytest.approx(whole * scores / scores.sum(), abs=1, rel=1e-9)


def test_shares_are_of_tokens_or_of_samples(make_facts):
    facts = make_facts([{"text": 100}] * 300 + [{"text": 1000}] * 300, sources(short=300, long=300))
    visual = plan_visual(facts, 4096, SPEC)

    def drawn(**mixture):
        rows, _ = choose_rows(facts, stage(mixture=mixture), visual, 0, 0)
        return np.bincount(rows, minlength=600), visual.tokens[rows].sum(), visual.tokens[rows[rows < 300]].sum()

    times, tokens, short = drawn(weights={"short": 3, "long": 1})
    assert short / tokens == pytest.approx(0.75, abs=0.01)
    assert tokens == pytest.approx(visual.tokens.sum(), rel=0.01)
    assert set(times[:300]) <= {8, 9}
    times, *_ = drawn(weights={"short": 3, "long": 1}, count="samples")
    assert (times[:300].sum(), times[300:].sum()) == (450, 150)
    assert set(times[:300]) == {1, 2}
    times, *_ = drawn(weights={"short": 1}, count="samples", size=75)
    assert (times[:300].sum(), times[300:].sum(), times.max()) == (75, 0, 1)
    times, tokens, short = drawn(tokens={"short": "4K", "long": "1M"})
    assert (short, tokens - short) == (pytest.approx(4096, abs=200), pytest.approx(2**20, abs=1100))
    times, tokens, short = drawn(temperature=1)  # as they are
    assert times.tolist() == [1] * 600
    times, tokens, short = drawn(temperature=1, weights={"short": 10, "long": 1})  # as many tokens of each: 10 times the weight
    assert short / tokens == pytest.approx(0.5, abs=0.05)
    _, tokens, short = drawn(temperature=1e6)
    assert short / tokens == pytest.approx(0.5, abs=0.01)


def test_repeat_time_is_the_pool_and_weight_the_share(make_facts):
    facts = make_facts([{"text": 100}] * 300, sources(a=(100, 0.5, 1.0), b=(100, 1.0, 3.0), c=(100, 2.0, 1.0)))
    visual = plan_visual(facts, 4096, SPEC)
    total = np.zeros(300, np.int64)
    for epoch in range(8):
        rows, _ = choose_rows(facts, stage(mixture={"temperature": 1e9, "count": "samples"}), visual, 0, epoch)
        times = np.bincount(rows, minlength=300)
        assert [times[start : start + 100].sum() for start in (0, 100, 200)] == [70, 210, 70]  # 350 rows by weights 1, 3, 1
        total += times
    assert np.count_nonzero(total[:100]) == 50
    assert np.ptp(total[100:200]) <= 1
    assert np.ptp(total[200:]) <= 2  # two copies of each row


def test_shares_are_of_rows_that_fit_and_others_are_listed(make_facts):
    rows = [{"text": 100}] * 10 + [{"text": 5000}] * 10 + [{"text": 100}] * 10
    facts = make_facts(rows, sources(a=20, b=10))
    plan = plan_stage(facts, stage(mixture={"weights": {"a": 1, "b": 1}, "count": "samples"}), SPEC)
    assert np.bincount(plan.pack_rows, minlength=30).tolist() == [1] * 10 + [0] * 10 + [1] * 10
    assert plan.drop_rows.tolist() == list(range(10, 20))
    assert [(one.name, one.rows, one.drawn, one.samples, one.share, one.most) for one in plan.draws()] == [
        ("a", 10, 10, 10, 0.5, 1),
        ("b", 10, 10, 10, 0.5, 1),
    ]
    summary = plan.summary()
    assert summary.rows == summary.rows_used + summary.rows_dropped + summary.rows_left_out
    long = make_facts(rows[10:], sources(a=10, b=10))
    with pytest.raises(ValueError, match=r"stage s: mixture gives source a a share, and none of its rows fits the stage"):
        plan_stage(long, stage(mixture={"weights": {"a": 1, "b": 1}}), SPEC)
    assert {one.name for one in plan_stage(long, stage(mixture={"temperature": 2.0}), SPEC).draws()} == {"b"}
    with pytest.raises(ValueError, match="none of 10 rows can be used"):
        plan_stage(make_facts(rows[10:20], sources(a=10)), stage(mixture={"temperature": 2.0}), SPEC)


def test_a_schedule_resumes_anywhere_and_counts_every_draw(make_facts):
    facts = make_facts([{"text": int(text)} for text in np.random.default_rng(0).integers(100, 3000, 400)], sources(a=300, b=100))
    config = stage(mixture={"weights": {"a": 1, "b": 3}, "size": 60000}, steps=40)
    whole = StageSchedule(facts, Config(), config, SPEC)
    trained = np.zeros(400, np.int64)
    for step in range(whole.steps):
        plan, place = whole.locate(step)
        for pack in plan.packs_of(place):
            np.add.at(trained, plan.rows_of(pack), 1)
    assert np.array_equal(whole.times_drawn(), trained)
    assert np.ptp(trained[300:]) <= 2  # the last epoch is cut off in the middle
    for step in (39, 17, 0):
        (plan, place), (again, there) = whole.locate(step), StageSchedule(facts, Config(), config, SPEC).locate(step)
        assert place == there
        assert np.array_equal(plan.pack_rows, again.pack_rows)
        assert np.array_equal(plan.pack_offsets, again.pack_offsets)


def test_configuration_says_one_thing(tmp_path):
    with pytest.raises(ValidationError, match="says nothing about shares; give weights, temperature or tokens"):
        stage(mixture={})
    with pytest.raises(ValidationError, match="tokens and temperature both say how much"):
        stage(mixture={"tokens": {"a": 5}, "temperature": 2})
    with pytest.raises(ValidationError, match="tokens and count: samples both say how much"):
        stage(mixture={"tokens": {"a": 5}, "count": "samples"})
    with pytest.raises(ValidationError, match="weight of source 'a' is -1"):
        stage(mixture={"weights": {"a": -1}})
    with pytest.raises(ValidationError, match="sources and mixture both say how often"):
        stage(mixture={"temperature": 2}, sources={"a": 1})
    (tmp_path / "rows.jsonl").write_text("{}\n")
    content = {
        "data": {"sources": {"chat": {"annotation": str(tmp_path / "rows.jsonl")}}},
        "stages": [{"name": "s", "max_tokens": 512, "mixture": {"weights": {"chats": 1}}}],
    }
    with pytest.raises(ConfigError, match=r"stages\.0\.mixture: no source is called 'chats'.*chat"):
        recipe_of(parse_config(content))


def mixed(colour_run, **fields):
    """A run with its rows as two sources, `a` and `b`."""
    both = {name: {"annotation": "rows.jsonl"} for name in ("a", "b")}
    stages = [{"name": "s", "max_tokens": 600, "packs_per_step": 2, "steps": 6, "mixture": {"weights": {"a": 3, "b": 1}, "size": 2000}}]
    return colour_run(rows=8, data={"sources": both, "workers": 1}, stages=stages, **fields)


def test_plan_and_stats_show_the_mixture_and_every_row(colour_run, tmp_path, eagle_here):
    (tmp_path / "run.yaml").write_text(dump_config(mixed(colour_run)))
    plan = eagle_here("plan", tmp_path / "run.yaml", "--rows", tmp_path / "draws.parquet").stdout
    shares = dict(re.findall(r"^s +([ab]) .* (\d+\.\d)% ", plan, re.MULTILINE))
    assert float(shares["a"]) == pytest.approx(75, abs=8)
    assert float(shares["b"]) == pytest.approx(25, abs=8)
    eagle_here("plan", tmp_path / "run.yaml", "--rows", tmp_path / "draws.csv")
    rows = pq.read_table(tmp_path / "draws.parquet").to_pylist()
    with open(tmp_path / "draws.csv", newline="") as file:
        assert [(one["source"], int(one["line"]), int(one["times"])) for one in csv.DictReader(file)] == [
            (one["source"], one["line"], one["times"]) for one in rows
        ]
    assert {(one["source"], one["line"]) for one in rows} == {(name, line) for name in "ab" for line in range(1, 10)}
    assert sum(one["times"] for one in rows) >= 6 * 2
    stats = eagle_here("data", "stats", tmp_path / "run.yaml", "--html", tmp_path / "page.html").stdout
    for line in re.findall(r"^s +([ab] .*)$", plan, re.MULTILINE):
        assert re.search(r" +".join(map(re.escape, line.split())), stats), line
    assert "<th>most draws of a row</th>" in (tmp_path / "page.html").read_text()
