"""Costs of packs: FLOPs by part, trees once, and packs and steps that are balanced by them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_model.flops import forward_flops
from eagle_model.presets import IN_USE, PRESETS
from eagle_model.sizes import stated_sizes
from eagle_model.visual import VisualSpec
from eagle_train.config import StageConfig
from eagle_train.planning.balance import WINDOW, deal_steps, exchange
from eagle_train.planning.costs import FP8_SPEEDUP, CostModel, cost_model, spread, work_of
from eagle_train.planning.packing import Packs, pack, shuffled
from eagle_train.planning.stages import plan_stage

SPEC = VisualSpec()
FULL = {"vision": "full", "connector": "full", "language": "full"}
CAPACITY = 32768


def costs_of(preset, modes=FULL):
    flops = forward_flops(stated_sizes(IN_USE | PRESETS[preset] | {"force_image_size": PRESETS[preset]["vision_config"]["image_size"]}))
    return cost_model(flops, modes)


def mixed_data(count, seed=0, most_tiles=60):
    """Tokens and tiles of samples: text (some long), single images, several images, and videos of up to `most_tiles` frames."""
    rng = np.random.default_rng(seed)
    kind, text = rng.random(count), rng.integers(30, 800, count)
    text = np.where(kind >= 0.85, np.minimum(rng.lognormal(8, 1, count).astype(int) + 50, CAPACITY), text)
    tiles = np.select(
        [kind < 0.35, kind < 0.5, kind < 0.6], [rng.integers(1, 14, count), rng.integers(3, 30, count), rng.integers(20, most_tiles, count)]
    )
    return np.minimum(text + 256 * tiles, CAPACITY), tiles


def alone(tokens, tiles, labels=None):
    """The work of samples that share nothing."""
    count = len(tokens)
    nothing = np.zeros(count, np.int64)
    return work_of(Packs(np.arange(count + 1), np.arange(count)), tokens, nothing if labels is None else labels, tiles, nothing)


def test_frozen_parts_have_less_backward():
    flops = forward_flops(stated_sizes(IN_USE | PRESETS["8b"] | {"force_image_size": 448}))
    full = cost_model(flops, FULL)
    assert full == CostModel(3 * flops.token, 3 * flops.pair, 3 * flops.label, 3 * (flops.tile + flops.connector))
    connector = cost_model(flops, {"vision": "frozen", "connector": "full", "language": "frozen"})
    # The gradient passes through the decoder, and not through the tower.
    assert connector == CostModel(2 * flops.token, 3 * flops.pair, 2 * flops.label, flops.tile + 3 * flops.connector)
    tower = cost_model(flops, {"vision": "lora", "connector": "frozen", "language": "lora"})
    assert tower.tile == 2 * (flops.tile + flops.connector)
    assert cost_model(flops, {"language": "full"}).tile == flops.tile + flops.connector


@pytest.mark.parametrize(
    ("recipe", "measured"), [("rowwise", (5183 / 4289, 4360 / 3663)), ("rowwise_with_gw_hp", (5183 / 4453, 4360 / 3808))]
)
def test_eight_bits_make_the_8b_faster_as_measured(recipe, measured):
    """Forward and backward of 32768 tokens, 2048 of them text with labels, on one H200: `step.py --only 32k --fp8`."""
    flops = forward_flops(stated_sizes(IN_USE | PRESETS["8b"] | {"force_image_size": 448}))
    work = alone(np.array([32768]), np.array([120]), np.array([2048]))
    faster = cost_model(flops, FULL).of(work) / cost_model(flops, FULL, {"language": recipe}).of(work)
    assert min(measured) * 0.98 < faster.item() < max(measured) * 1.02


def test_eight_bits_are_of_the_linear_layers_of_their_part():
    flops = forward_flops(stated_sizes(IN_USE | PRESETS["8b"] | {"force_image_size": 448}))
    plain = cost_model(flops, FULL)
    assert cost_model(flops, FULL, {}) == plain
    language, vision, connector = (cost_model(flops, FULL, {part: "rowwise"}) for part in ("language", "vision", "connector"))
    assert (language.pair, language.label, language.tile) == (plain.pair, plain.label, plain.tile)
    assert language.token == pytest.approx(plain.token / FP8_SPEEDUP)
    assert vision.token == connector.token == plain.token
    saved = 1 - 1 / FP8_SPEEDUP
    assert plain.tile - vision.tile == pytest.approx(3 * flops.tile_linear * saved)
    assert plain.tile - connector.tile == pytest.approx(3 * flops.connector * saved)
    exact = cost_model(flops, FULL, {"language": "rowwise_with_gw_hp"})
    assert exact.token == pytest.approx(flops.token * (1 + 2 / FP8_SPEEDUP))
    adapters = FULL | {"language": "lora"}  # without a gradient of the weight, the recipes are the same
    costs = {cost_model(flops, adapters, {"language": recipe}) for recipe in ("rowwise", "rowwise_with_gw_hp")}
    assert len(costs) == 1


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_tree_costs_its_shared_part_once(data):
    shared = data.draw(st.integers(0, 50))
    own = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    trees = Packs(np.array([0, len(own)]), np.arange(len(own)))
    tokens = np.array(own) + shared
    work = work_of(trees, tokens, np.arange(len(own)), np.full(len(own), 3), np.full(len(own), shared))
    # Every query counted on its own: the prefix sees itself, a branch the prefix and itself.
    pairs = sum(range(1, shared + 1)) + sum(shared + query for n in own for query in range(1, n + 1))
    assert [column.item() for column in work] == [shared + sum(own), pairs, sum(range(len(own))), 3]


def test_spread_is_the_time_that_groups_wait():
    costs = np.array([4.0, 2.0, 2.0, 2.0, 3.0, 3.0, 1.0, 1.0])
    assert spread(costs, 4, 1) == 0
    assert spread(costs, 4, 2) == pytest.approx((4 + 2 + 3 + 1) / (3 + 2 + 3 + 1) - 1)
    assert spread(costs, 4, 4) == pytest.approx((4 + 3) / (2.5 + 2) - 1)
    assert spread(costs[:0], 4, 2) == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 300), max_size=200), st.integers(300, 1000), st.integers(0, 2**40), st.integers(1, 70))
def test_costs_that_are_tokens_change_nothing(lengths, capacity, seed, window):
    lengths = np.array(lengths, np.int64)
    plain, same = (pack(lengths, capacity, costs=costs, seed=seed, window=window) for costs in (None, lengths.astype(float)))
    assert np.array_equal(plain.offsets, same.offsets)
    assert np.array_equal(plain.items, same.items)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1e13)), max_size=120),
    st.integers(300, 1000),
    st.integers(0, 99),
    st.integers(1, 70),
)
def test_with_any_costs_every_sample_is_in_one_pack_that_holds_it(samples, capacity, seed, window):
    lengths, costs = np.array([n for n, _ in samples], np.int64), np.array([cost for _, cost in samples])
    packs = pack(lengths, capacity, costs=costs, seed=seed, window=window)
    assert sorted(packs.items.tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[items].sum() <= capacity for items in np.split(packs.items, packs.offsets[1:-1]) if len(lengths))
    again = pack(lengths, capacity, costs=costs, seed=seed, window=window)
    assert np.array_equal(packs.items, again.items)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(-20, 20)), min_size=1, max_size=30), st.integers(0, 20))
def test_an_exchange_never_makes_packs_longer_or_less_alike(samples, spare):
    bins, lengths, costs = (np.array(column, np.int64) for column in zip(*samples))
    before = np.bincount(bins, weights=lengths, minlength=5)
    capacity = int(before.max()) + spare
    after = exchange(bins, lengths, costs.astype(float), 5, capacity, 1.0)
    assert np.bincount(after, weights=lengths, minlength=5).max() <= capacity
    assert after.min() >= 0
    assert len(np.bincount(after, minlength=5)) == 5

    def squares(bins):
        return (np.bincount(bins, weights=costs, minlength=5) ** 2).sum()

    assert squares(after) <= squares(bins) + 1e-6


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=4, max_size=7))
def test_two_packs_are_as_even_as_one_exchange_at_a_time_can_make_them(samples):
    """Brute force: no exchange of two samples, and no move, would bring the two packs closer."""
    lengths, costs = np.array([n for n, _ in samples]), np.array([cost for _, cost in samples], float)
    bins = np.arange(len(samples)) % 2
    capacity = int(np.bincount(bins, weights=lengths).max()) + 2
    after = exchange(bins, lengths, costs, 2, capacity, 1e-9)

    def gap(bins):
        spent = np.bincount(bins, weights=costs, minlength=2)
        return abs(spent[0] - spent[1])

    first, second = np.flatnonzero(after == 0), np.flatnonzero(after == 1)
    for mine, yours in itertools.product([*first, None], [*second, None]):
        other = after.copy()
        if mine is not None:
            other[mine] = 1
        if yours is not None:
            other[yours] = 0
        if np.bincount(other, weights=lengths, minlength=2).max() <= capacity:
            # What wins less than a fiftieth of the gap is not exchanged.
            assert gap(other) >= 0.98 * gap(after) - 1e-6


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_steps_are_dealt_from_both_halves_of_their_window(steps, per_step, seed, alike):
    count = steps * per_step
    costs = np.ones(count) if alike else np.random.default_rng(seed).lognormal(size=count)
    order = shuffled(count, seed).reshape(steps, per_step)
    dealt = deal_steps(order, costs, shuffled(count, seed + 1))
    if alike:
        assert np.array_equal(dealt, order)
        return
    upper = per_step // 2
    for start in range(0, steps, WINDOW):
        window, before = dealt[start : start + WINDOW], order[start : start + WINDOW]
        assert sorted(window.ravel()) == sorted(before.ravel())
        if count > 1 and costs.std() > 0.01 * costs.mean() and upper:
            assert costs[window[:, :upper]].min() >= costs[window[:, upper:]].max()


@pytest.mark.parametrize("preset", ["8b", "2b", "1b"])
def test_packs_of_mixed_data_are_alike_in_cost_and_as_full(preset):
    tokens, tiles = mixed_data(12000)
    costs = costs_of(preset).of(alone(tokens, tiles))
    plain, balanced = pack(tokens, CAPACITY, seed=1), pack(tokens, CAPACITY, costs=costs, seed=1)
    assert len(balanced) <= len(plain) * 1.001

    def deviation(packs):
        spent = np.add.reduceat(costs[packs.items], packs.offsets[:-1])
        return spent.std() / spent.mean()

    assert deviation(balanced) < 0.6 * deviation(plain)


@pytest.mark.parametrize("preset", ["8b", "2b", "1b"])
def test_data_groups_take_equal_time_on_mixed_data(make_facts, preset):
    rng = np.random.default_rng(0)
    rows = []
    for kind in rng.random(4000):
        text = int(rng.integers(30, 800) if kind < 0.85 else min(rng.lognormal(8, 1), 30000) + 50)
        sizes = [(448 * int(rng.integers(1, 5)), 448 * int(rng.integers(1, 4))) for _ in range(int(rng.integers(1, 6)))]
        videos = [int(rng.integers(20, 100))] if 0.5 <= kind < 0.6 else []
        rows.append({"text": text, "labels": text // 4, "images": sizes if kind < 0.5 else [], "videos": videos})
    facts, costs = make_facts(rows), costs_of(preset)
    stage = StageConfig(name="s", max_tokens=CAPACITY, packs_per_step=16)
    plain, balanced = (plan_stage(facts, stage, SPEC, costs=chosen) for chosen in (None, costs))
    assert balanced.packs == plain.packs
    assert sorted(balanced.pack_rows) == sorted(plain.pack_rows)
    for groups in (2, 4, 8):
        assert balanced.spread(groups) < 0.05
        assert balanced.spread(groups) < 0.6 * plain.spread(groups, costs)
    with pytest.raises(ValueError, match="set it to 15 or 18"):
        balanced.spread(3)
    assert balanced.summary().cost_spread == pytest.approx(1 + balanced.spread(16), rel=0.02)


@pytest.mark.parametrize("preset", ["8b", "1b"])
def test_text_of_equal_cost_is_planned_as_before(make_facts, preset):
    facts = make_facts([{"text": 512, "labels": 100}] * 640)
    stage = StageConfig(name="s", max_tokens=4096, packs_per_step=4)
    plain, same = (plan_stage(facts, stage, SPEC, seed=3, costs=costs) for costs in (None, costs_of(preset)))
    assert np.array_equal(plain.pack_rows, same.pack_rows)
    assert np.array_equal(plain.pack_offsets, same.pack_offsets)
