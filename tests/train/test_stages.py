"""Stage plans: every row once, steps whole, ranks even, the same everywhere, resumable by index."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_model.visual import VisualSpec
from eagle_train.config import Config, StageConfig
from eagle_train.data.facts import FactsSource
from eagle_train.planning import stages
from eagle_train.planning.draws import draw_rows
from eagle_train.planning.packing import sample_costs
from eagle_train.planning.stages import StageSchedule, plan_stage
from eagle_train.planning.steps import pack_costs

SPEC = VisualSpec()


def stage(**fields):
    return StageConfig(**{"name": "s", "max_tokens": 4096, "packs_per_step": 4, **fields})


def sources(**entries):
    result, first = [], 0
    for name, (rows, repeat_time, weight) in entries.items():
        result.append(FactsSource(name, Path(f"{name}.jsonl"), Path("."), first, rows, 0, repeat_time, weight, None))
        first += rows
    return result


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 6000), st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.integers(0, 5),
)
def test_every_row_is_in_one_pack_or_dropped(make_facts, content, packs_per_step, seed, epoch):
    rows = [{"text": text, "images": [(500, 400)] * images, "videos": [pages] * (pages > 0)} for text, images, pages in content]
    facts = make_facts([*rows, {"text": 9}])  # at least one row fits
    config = stage(packs_per_step=packs_per_step)
    plan = plan_stage(facts, config, SPEC, seed=seed, epoch=epoch)
    assert sorted([*plan.pack_rows.tolist(), *plan.drop_rows.tolist()]) == list(range(len(facts)))
    assert plan.packs % packs_per_step == 0
    assert plan.packs == plan.steps * packs_per_step
    for pack in range(plan.packs):
        assert plan.visual.tokens[plan.rows_of(pack)].sum() <= 4096
    for entry, row in zip(plan.drops(), plan.drop_rows.tolist(), strict=True):
        assert (entry.line, entry.source, entry.where) == (row + 1, "all", "stage s")
        assert "max_tokens" in entry.detail
    counts = np.diff(plan.pack_offsets)
    assert counts.min() > 0 or (counts.max() == 1 and (counts == 0).sum() < packs_per_step)
    summary = plan.summary()
    assert summary.rows == summary.rows_used + summary.rows_dropped + summary.rows_left_out == len(facts)
    assert sum(summary.drops.values()) == summary.rows_dropped


def test_pure_function_of_seed_and_epoch(make_facts):
    facts = make_facts([{"text": int(text)} for text in np.random.default_rng(0).integers(100, 2000, 500)])
    plans = [plan_stage(facts, stage(), SPEC, seed=seed, epoch=epoch) for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert np.array_equal(plans[0].pack_rows, plans[1].pack_rows)
    assert np.array_equal(plans[0].pack_offsets, plans[1].pack_offsets)
    assert not np.array_equal(plans[0].pack_rows, plans[2].pack_rows)
    assert not np.array_equal(plans[0].pack_rows, plans[3].pack_rows)


def test_repeat_time_shows_the_same_part_in_every_epoch(make_facts):
    facts = make_facts([{"text": 100}] * 300, sources(a=(100, 0.25, 1.0), b=(100, 2.5, 1.0), c=(100, 1.0, 1.0)))
    counts = [np.bincount(draw_rows(facts, stage(), 7, epoch), minlength=300) for epoch in range(3)]
    assert np.array_equal(counts[0], counts[1])
    assert np.array_equal(counts[0], counts[2])
    assert counts[0][:100].sum() == 25
    assert counts[0][:100].max() == 1
    assert sorted(set(counts[0][100:200].tolist())) == [2, 3]
    assert counts[0][100:200].sum() == 250
    assert set(counts[0][200:].tolist()) == {1}
    assert not np.array_equal(counts[0][:100], np.bincount(draw_rows(facts, stage(), 8, 0), minlength=300)[:100])


def test_weight_multiplies_and_is_drawn_anew(make_facts):
    facts = make_facts([{"text": 100}] * 200, sources(a=(100, 0.5, 0.5), b=(100, 1.0, 2.25)))
    counts = [np.bincount(draw_rows(facts, stage(), 7, epoch), minlength=200) for epoch in range(20)]
    for count in counts:
        assert count[:100].sum() == 25
        assert count[100:].sum() == 225
    seen = np.sum(counts, axis=0)
    assert np.count_nonzero(seen[:100]) == 50  # the half that repeat_time keeps, and all of it in time
    assert not np.array_equal(counts[0], counts[1])


def test_a_stage_weighs_sources_itself(make_facts):
    facts = make_facts([{"text": 100}] * 30, sources(a=(10, 1.0, 3.0), b=(10, 2.0, 1.0), c=(10, 1.0, 1.0)))
    plan = plan_stage(facts, stage(sources={"a": 1.0, "b": 2.0}), SPEC)
    assert np.bincount(plan.pack_rows, minlength=30).tolist() == [1] * 10 + [4] * 10 + [0] * 10
    assert plan.summary().rows_left_out == 10


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_share_steps_evenly(make_facts, ranks):
    facts = make_facts([{"text": int(text)} for text in np.random.default_rng(1).integers(50, 4096, 3000)])
    plan = plan_stage(facts, stage(packs_per_step=16), SPEC)
    spreads = []
    for step in range(plan.steps):
        shares = [plan.packs_of(step, rank, ranks) for rank in range(ranks)]
        assert sorted(pack for share in shares for pack in share) == list(range(step * 16, step * 16 + 16))
        for together in zip(*shares, strict=True):  # one micro-step: all ranks at once
            costs = [sample_costs(plan.visual.tokens[plan.rows_of(pack)]).sum() for pack in together]
            spreads.append(max(costs) / (sum(costs) / ranks))
    assert np.mean(spreads[: -16 // ranks]) < 1.02
    if ranks == 1:
        with pytest.raises(ValueError, match="3 data-parallel groups can't share evenly; set it to 15 or 18"):
            plan.packs_of(0, 0, 3)
        with pytest.raises(IndexError):
            plan.packs_of(plan.steps)


def test_pack_costs_are_sums():
    lengths, offsets = np.array([10, 20, 30]), np.array([0, 2, 2, 3])
    assert pack_costs(sample_costs(lengths), offsets) == pytest.approx([sample_costs([10, 20]).sum(), 0.0, sample_costs([30]).sum()])


def schedule(facts, **fields):
    return StageSchedule(facts, Config(), stage(**fields), SPEC)


def test_schedule_counts_epochs_and_steps(make_facts):
    facts = make_facts([{"text": int(text)} for text in np.random.default_rng(2).integers(100, 3000, 400)])
    one = schedule(facts)
    assert one.steps == one.plan(0).steps
    three = schedule(facts, epochs=2.5)
    lengths = [three.plan(epoch).steps for epoch in range(3)]
    assert three.steps == lengths[0] + lengths[1] + round(lengths[2] / 2)
    located = [three.locate(step) for step in range(three.steps)]
    assert [(plan.epoch, step) for plan, step in located] == [(epoch, step) for epoch in range(3) for step in range(lengths[epoch])][
        : three.steps
    ]
    # Resuming is an index: a new schedule finds the same packs without having walked there.
    plan, step = schedule(facts, epochs=2.5).locate(three.steps - 1)
    rows = [plan.rows_of(pack).tolist() for pack in plan.packs_of(step)]
    assert rows == [located[-1][0].rows_of(pack).tolist() for pack in located[-1][0].packs_of(located[-1][1])]
    assert schedule(facts, steps=1000).locate(999)[0].epoch > 2
    with pytest.raises(IndexError, match="stage s"):
        three.locate(three.steps)


def test_nothing_that_fits_is_an_error(make_facts):
    facts = make_facts([{"text": 5000}])
    with pytest.raises(ValueError, match=r"stage s: none of 1 rows .* \(1 do not fit 4096 tokens, 0 are never drawn\)"):
        plan_stage(facts, stage(), SPEC)


def test_an_epoch_that_drew_nothing_is_skipped(make_facts):
    facts = make_facts([{"text": 5000}, {"text": 100}], sources(a=(2, 1.0, 0.5)))
    long = schedule(facts, steps=40, packs_per_step=1)
    epochs = [long.locate(step)[0].epoch for step in range(40)]
    assert sorted(set(epochs)) == epochs  # one step an epoch
    assert 50 < epochs[-1] < 120  # about every other epoch draws the row that fits
    empty = long.plan(next(epoch for epoch in range(epochs[-1]) if epoch not in epochs))
    assert (empty.steps, empty.summary().rows_dropped) == (0, 1)
    assert schedule(facts, epochs=30, packs_per_step=1).steps == sum(epoch < 30 for epoch in epochs)
    name = next(name for name in "abcdefgh" if not plan_stage(facts, stage(name=name), SPEC).steps)
    with pytest.raises(ValueError, match=f"stage {name}: none of 2 rows"):
        schedule(facts, name=name)  # its only epoch drew nothing


@pytest.mark.parametrize(("texts", "weight", "numbers"), [((5000, 100), 0.2, (0, 2)), ((5000, 6000), 0.5, (2, 0))])
def test_what_no_epoch_draws_or_fits_is_an_error(make_facts, texts, weight, numbers):
    facts = make_facts([{"text": text} for text in texts], sources(a=(2, 1.0, weight)))
    with pytest.raises(ValueError, match=rf"none of 2 rows .*\({numbers[0]} do not fit 4096 tokens, {numbers[1]} are never drawn"):
        schedule(facts, steps=3).locate(0)


def test_threads_plan_an_epoch_once(make_facts, monkeypatch):
    planned, running = [], []

    def slow(*arguments, **options):
        running.append(None)
        assert len(running) == 1
        time.sleep(0.01)
        planned.append(options["epoch"])
        running.pop()
        return plan_stage(*arguments, **options)

    monkeypatch.setattr(stages, "plan_stage", slow)
    shared = schedule(make_facts([{"text": 3000}] * 4), steps=5, packs_per_step=2)
    with ThreadPoolExecutor(4) as threads:
        located = list(threads.map(shared.locate, [0, 1, 2, 3, 4, 4, 3]))
    assert [(plan.epoch, step) for plan, step in located] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 0), (1, 1)]


def test_fewer_samples_than_packs_leaves_empty_packs(make_facts):
    facts = make_facts([{"text": 100}, {"text": 200}])
    plan = plan_stage(facts, stage(packs_per_step=8), SPEC)
    assert (plan.steps, plan.packs) == (1, 8)
    assert sorted(len(plan.rows_of(pack)) for pack in range(8)) == [0] * 6 + [1] * 2
    assert [len(plan.samples(pack)) for pack in plan.packs_of(0)][:2] == [1, 1]
