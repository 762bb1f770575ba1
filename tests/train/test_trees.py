"""Rows that share their media are trees in packs: grouped by facts, planned for the tightest row, read once, accountable one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_model.prompt import IGNORE_INDEX, CachedEncoder
from eagle_model.visual import VisualSpec
from eagle_train.config import StageConfig
from eagle_train.data.ledger import Entry
from eagle_train.data.prepare import prepare
from eagle_train.loading.loader import Task
from eagle_train.loading.pack import Share, load_pack
from eagle_train.planning.stages import StageSchedule, pack_tiles, pack_tokens, plan_stage
from eagle_train.planning.trees import make_trees, media_groups, media_tokens
from eagle_train.planning.visual import plan_visual

SPEC = VisualSpec(tile_size=32, tokens_per_tile=4, min_frames=2)
STAGE = {"name": "s", "max_tokens": 4096, "packs_per_step": 1, "steps": 1}


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 30)), min_size=1, max_size=30),
    st.lists(st.integers(0, 60), min_size=4, max_size=4),
    st.lists(st.integers(0, 29), min_size=1, max_size=60),
)
def test_trees_hold_every_drawn_row_once_within_the_capacity(rows, visual, drawn):
    groups = np.array([group for group, _ in rows])
    shared = np.array([visual[group] if group >= 0 else 7 for group, _ in rows])
    tokens = shared + np.array([own for _, own in rows])
    drawn = np.sort(np.array(drawn) % len(rows))
    items, lengths = make_trees(drawn, groups, tokens, shared, 100)
    assert sorted(items.items.tolist()) == list(range(len(drawn)))
    for first, last, length in zip(items.offsets, items.offsets[1:], lengths.tolist(), strict=False):
        members = drawn[items.items[first:last]]
        assert len(set(members.tolist())) == len(members)
        assert len(set(groups[members].tolist())) == 1
        assert len(members) == 1 or groups[members[0]] >= 0
        assert length == shared[members[0]] + (tokens - shared)[members].sum() <= 100
    if not np.any(groups[drawn] >= 0):
        assert items.items.tolist() == list(range(len(drawn)))
        assert np.array_equal(lengths, tokens[drawn])


@pytest.fixture
def videos(tmp_path, write_video, picture, row, write_jsonl, make_config):
    """Two videos and an image with questions, and rows that share nothing: `make(share_media, **options)` gives the configuration."""
    write_video(tmp_path / "a.mp4", frames=40)
    write_video(tmp_path / "b.mp4", frames=20)
    (tmp_path / "c.png").write_bytes(picture())
    rows = [
        row("What is it?", "A square.", video="a.mp4"),
        row("How many are there, and of which colour is each of them?", "Four: red, red, blue and green.", video="a.mp4"),
        row("Text alone?", "Yes."),
        row("Why?", "Because.", video="b.mp4"),
        row("When?", "At noon.", video="a.mp4"),
        row("When?", "At noon.", video={"path": "a.mp4", "start": 1.0, "end": 3.0}),
        row("Look. <video> What is it?", "A circle.", video="a.mp4"),
        row("Where?", "Here.", image="c.png"),
        row("Who?", "Nobody is in this picture.", image="c.png"),
        row("Other system", "Yes.", video="a.mp4", system="Answer briefly."),
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    def make(share_media=True, **options):
        sources = {"all": {"annotation": "rows.jsonl", "root": str(tmp_path)}}
        return make_config(sources, stages=[STAGE | options], packing={"share_media": share_media})

    return make


def planned(config, tokenizer, epoch=0):
    return StageSchedule(prepare(config, tokenizer).facts, config, config.stages[0], SPEC).plan(epoch)


def test_groups_are_the_same_media_and_the_same_text_before_them(videos, tokenizer):
    groups = media_groups(prepare(videos(), tokenizer).facts).tolist()
    assert groups[0] == groups[1] == groups[4] >= 0
    assert groups[7] == groups[8] >= 0
    assert groups[0] != groups[7]
    assert [group for i, group in enumerate(groups) if i not in (0, 1, 4, 7, 8)] == [-1] * 5


def test_frames_of_a_group_are_those_of_its_tightest_row_that_fits(videos, tokenizer):
    facts, group, differing = prepare(videos(), tokenizer).facts, [0, 1, 4], 0
    for max_tokens in range(200, 600, 10):
        plain, shared = (plan_visual(facts, max_tokens, SPEC, share_media=share) for share in (False, True))
        fits = [row for row in group if plain.status[row] == 0]
        assert np.array_equal(plain.status, shared.status)
        before, after = (plans.frames[plans.video_offsets[fits]].tolist() for plans in (plain, shared))
        assert after == [min(before, default=0)] * len(fits)
        assert (shared.tokens <= max_tokens).all()
        differing += len(set(before)) > 1
    assert differing


def test_a_reserve_leaves_room_for_the_questions_of_a_group(videos, tokenizer):
    """With a video that could fill the context the group is one tree, for a bounded number of frames; no row is lost by it."""
    facts, group, trees = prepare(videos(), tokenizer).facts, [0, 1, 4], {0.0: [], 0.25: []}
    groups = media_groups(facts)
    for max_tokens in range(60, 600, 5):
        plain = plan_visual(facts, max_tokens, SPEC)
        for reserve, counts in trees.items():
            shared = plan_visual(facts, max_tokens, SPEC, share_media=True, reserve=reserve)
            assert np.array_equal(plain.status, shared.status)
            assert (shared.tokens <= max_tokens).all()
            rows = np.array([row for row in group if shared.status[row] == 0])
            if not len(rows):
                continue
            frames = shared.frames[shared.video_offsets[rows]]
            assert len(set(frames.tolist())) == 1
            tightest = plan_visual(facts, max_tokens, SPEC, share_media=True).frames[shared.video_offsets[rows[0]]]
            lost = tightest - frames[0]
            assert 0 <= lost * SPEC.tokens_per_tile <= reserve * max_tokens + plain.tokens.max()  # a frame is the smallest step
            items, _ = make_trees(rows, groups, shared.tokens, media_tokens(facts, shared), max_tokens)
            counts.append(len(rows) - (len(items.offsets) - 1))
    assert sum(trees[0.25]) > sum(trees[0.0])


def test_a_group_is_packed_once(videos, tokenizer):
    plain, shared = (planned(videos(share), tokenizer) for share in (False, True))
    assert sorted(shared.pack_rows.tolist()) == sorted(plain.pack_rows.tolist()) == list(range(10))
    before, after = plain.summary(), shared.summary()
    assert (after.rows_used, after.samples) == (10, 10)
    assert after.tokens < before.tokens
    assert after.tiles < before.tiles
    total = 0
    for pack in range(shared.packs):
        samples = shared.samples(pack)
        assert pack_tokens(samples) <= 4096
        total += pack_tokens(samples)
    assert total == after.tokens
    assert sum(pack_tiles(shared.samples(pack), SPEC) for pack in range(shared.packs)) == after.tiles


def test_without_shared_media_plans_are_the_same(make_facts):
    """Groups of one row: the same packs, numbers and visual plans."""
    rows = [{"text": 20 + i, "images": [(500, 400 + i)] * (i % 3)} for i in range(40)]
    facts = make_facts(rows)

    plans = [
        plan_stage(facts, StageConfig(name="s", max_tokens=4096, packs_per_step=2), VisualSpec(), share_media=s) for s in (False, True)
    ]
    for name in ("pack_rows", "pack_offsets", "drop_rows", "pack_items"):
        assert np.array_equal(getattr(plans[0], name), getattr(plans[1], name)), name
    assert plans[0].summary() == plans[1].summary()


def loaded(plan, tokenizer, **options):
    return [load_pack(plan.samples(pack), CachedEncoder(tokenizer), SPEC, **options) for pack in range(plan.packs)]


@pytest.mark.parametrize("weighting", ["token", "sample", "sqrt"])
def test_batches_hold_every_label_with_its_weight_and_every_medium_once(videos, tokenizer, weighting):
    plain, shared = (loaded(planned(videos(share), tokenizer), tokenizer, weighting=weighting) for share in (False, True))

    def labels(packs):
        """Targets with their weights, positions' distances and answers, sorted."""
        result = []
        for pack in packs:
            batch = pack.batch
            kept = batch.targets != IGNORE_INDEX
            result += list(zip(batch.targets[kept].tolist(), batch.token_weights[kept].tolist()))
        return sorted(result)

    assert labels(plain) == labels(shared)
    assert sum(p.batch.label_weight for p in plain) == pytest.approx(sum(p.batch.label_weight for p in shared))
    assert sorted(x for p in plain for x in p.sample_ids) == sorted(x for p in shared for x in p.sample_ids)
    assert any(pack.batch.prefixes for pack in shared)
    assert not any(pack.batch.prefixes for pack in plain)
    for pack in shared:
        batch = pack.batch
        assert np.array_equal(batch.position_ids, batch.layout().position_ids().numpy())
        assert len(batch.visual_index) == 4 * len(batch.tiles)
        assert pack.tokens <= pack.planned_tokens <= 4096


def test_branches_are_the_rows_as_they_are_alone(videos, tokenizer):
    """Prefix and branch together are the ids of the row in a pack of its own, with the same frames."""
    plan = planned(videos(), tokenizer)
    for pack in range(plan.packs):
        samples = plan.samples(pack)
        batch = load_pack(samples, CachedEncoder(tokenizer), SPEC).batch
        cu, prefixes = batch.cu_seqlens, batch.prefixes or (-1,) * (len(batch.cu_seqlens) - 1)
        inside = {p for p in prefixes if p >= 0}
        documents = [i for i in range(len(prefixes)) if i not in inside]
        alone = [load_pack([one._replace(tree=None)], CachedEncoder(tokenizer), SPEC).batch for one in samples]
        for document, one in zip(documents, alone, strict=True):
            p = prefixes[document]
            parts = [slice(cu[p], cu[p + 1])] if p >= 0 else []
            parts.append(slice(cu[document], cu[document + 1]))
            for name in ("input_ids", "targets", "position_ids"):
                assert np.array_equal(np.concatenate([getattr(batch, name)[part] for part in parts]), getattr(one, name)), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_ranks_make_the_whole(videos, tokenizer, ranks):
    plan = planned(videos(), tokenizer)
    for pack in range(plan.packs):
        samples = plan.samples(pack)
        whole = load_pack(samples, CachedEncoder(tokenizer), SPEC).batch
        parts = [load_pack(samples, CachedEncoder(tokenizer), SPEC, share=Share(rank, ranks)).batch for rank in range(ranks)]
        assert np.array_equal(np.concatenate([part.tiles for part in parts]), whole.tiles)
        assert all(part.prefixes == whole.prefixes for part in parts)
        task = Task(0, tuple(samples), "token")
        assert task.nbytes(SPEC) >= whole.nbytes


def group(plan):
    """The pack with the three questions on a.mp4, and their places in it."""
    for pack in range(plan.packs):
        samples = plan.samples(pack)
        places = [i for i, one in enumerate(samples) if one.address.line in (1, 2, 5)]
        if len(places) == 3 and samples[places[0]].tree is not None:
            return samples, places
    raise AssertionError("no pack has the tree")


def test_a_row_that_changed_goes_to_the_ledger_and_the_others_stay(videos, tokenizer, tmp_path):
    samples, _ = group(planned(videos(), tokenizer))
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"a.mp4", b"b.mp4")  # as long as before
    path.write_bytes(b"".join(lines))
    pack = load_pack(samples, CachedEncoder(tokenizer), SPEC)
    assert [(entry.line, entry.reason) for entry in pack.failed] == [(2, "changed")]
    assert "no longer has the media of all:1" in pack.failed[0].detail
    assert {1, 5} <= {line for _, line in pack.sample_ids}


def test_a_medium_that_is_gone_is_missing_for_each_of_its_rows(videos, tokenizer, tmp_path):
    samples, _ = group(planned(videos(), tokenizer))
    (tmp_path / "a.mp4").unlink()
    pack = load_pack(samples, CachedEncoder(tokenizer), SPEC)
    assert {1, 2, 5} <= {entry.line for entry in pack.failed}
    assert sorted([*pack.missing, *(i for i, one in enumerate(samples) if ("all", one.address.line) in pack.sample_ids)]) == list(
        range(len(samples))
    )
    again = load_pack(samples, CachedEncoder(tokenizer), SPEC, skip=pack.missing)
    assert again.sample_ids == pack.sample_ids


def test_one_row_that_is_left_is_a_plain_sample(videos, tokenizer):
    samples, places = group(planned(videos(), tokenizer))
    whole = load_pack(samples, CachedEncoder(tokenizer), SPEC)
    skip = {place: Entry("all", samples[place].address.line, "unreadable", "", "train") for place in places[1:]}
    pack = load_pack(samples, CachedEncoder(tokenizer), SPEC, skip=skip)
    assert ("all", 1) in pack.sample_ids
    assert len(pack.batch.prefixes) < len(whole.batch.prefixes)


def test_a_branch_that_does_not_fit_alone_is_dropped_and_the_others_stay(videos, tokenizer, tmp_path, row, write_jsonl):
    rows = (tmp_path / "rows.jsonl").read_bytes()
    write_jsonl(tmp_path / "rows.jsonl", [*rows.splitlines(), row("Long? " + "x" * 5000, "No.", video="a.mp4")])
    plan = planned(videos(), tokenizer)
    assert plan.drop_rows.tolist() == [10]
    assert [entry.line for entry in plan.drops()] == [11]
    assert {0, 1, 4} <= set(plan.pack_rows.tolist())
    assert next(one.plan for one in group(plan)[0] if one.address.line == 1).videos[0].count >= 2
