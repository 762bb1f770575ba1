"""Packs become arrays: targets, weights and tiles are right, and what can't be read is missing and reported, never replaced."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eagle_model.prompt import IGNORE_INDEX, CachedEncoder, Encoded
from eagle_model.visual import VisualSpec, facts, read
from eagle_train.data.ledger import Entry
from eagle_train.data.prepare import prepare
from eagle_train.distributed.agreement import agree
from eagle_train.loading.pack import LoadedPack, Share, join_samples, load_pack, token_weight
from eagle_train.planning.stages import StageSchedule

SPEC = VisualSpec(tile_size=32, tokens_per_tile=4)


@pytest.fixture
def packs(colour_run, tokenizer):
    """The packs of the first stage's first epoch."""
    config = colour_run()
    plan = StageSchedule(prepare(config, tokenizer).facts, config, config.stages[0], SPEC).plan(0)
    return [tuple(plan.samples(pack)) for pack in range(plan.packs)]


def test_every_row_comes_once_with_its_own_tiles(packs, tokenizer):
    encoder = CachedEncoder(tokenizer)
    seen = []
    for pack in packs:
        loaded = load_pack(pack, encoder, SPEC)
        batch = loaded.batch
        assert not loaded.failed
        seen += loaded.sample_ids
        assert loaded.tokens == batch.cu_seqlens[-1] <= loaded.planned_tokens <= 640
        assert len(batch.visual_index) == 4 * len(batch.tiles)
        assert (batch.input_ids[batch.visual_index] == encoder.token_id("<IMG_CONTEXT>")).all()
        tile = 0
        for (_, line), start, stop in zip(loaded.sample_ids, batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
            inside = (batch.visual_index >= start) & (batch.visual_index < stop)
            count = int(inside.sum()) // 4
            if line <= 24:  # images of one colour, in the order in which they were written
                expected = [(255, 0, 0), (0, 160, 0), (0, 0, 255)][(line - 1) % 3]
                assert (batch.tiles[tile : tile + count] == np.array(expected)).all()
                assert count == (1 if (line - 1) % 2 else 3)
            tile += count
            assert (batch.position_ids[start:stop] == np.arange(stop - start)).all()
    assert sorted(line for _, line in seen) == list(range(1, 26))


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_make_the_whole_and_nobody_reads_more(packs, tokenizer, monkeypatch, ranks):
    encoder = CachedEncoder(tokenizer)
    counts = {"images": 0, "frames": 0}

    def count_image(*arguments, open_image=facts.open_image, **options):
        counts["images"] += 1
        return open_image(*arguments, **options)

    def count_frames(path, times, *arguments, read_frames=read.read_frames, **options):
        counts["frames"] += len(times)
        return read_frames(path, times, *arguments, **options)

    monkeypatch.setattr(facts, "open_image", count_image)
    monkeypatch.setattr(read, "read_frames", count_frames)
    for pack in packs:
        counts.update(images=0, frames=0)
        whole = load_pack(pack, encoder, SPEC)
        alone = dict(counts)
        parts = [load_pack(pack, encoder, SPEC, share=Share(rank, ranks)) for rank in range(ranks)]
        assert np.array_equal(np.concatenate([part.batch.tiles for part in parts]), whole.batch.tiles)
        sizes = [len(part.batch.tiles) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert counts["frames"] == 2 * alone["frames"]
        assert counts["images"] <= 2 * alone["images"] + ranks - 1  # an image is read twice only where a share ends within it
        for part in parts:
            assert part.tile_count == whole.tile_count == len(whole.batch.tiles)
            for name in ("input_ids", "targets", "position_ids", "visual_index", "token_weights"):
                assert np.array_equal(getattr(part.batch, name), getattr(whole.batch, name))


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_ranks_agree_on_what_is_missing(data):
    """Every rank fails to read other samples, and more the second time: in the end all have the same, each with its own share."""
    places, ranks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    fails = {(rank, turn): data.draw(st.sets(st.integers(0, places - 1))) for rank in range(ranks) for turn in range(3)}
    turns = [0] * ranks

    def read(rank, known):
        turn, turns[rank] = turns[rank], turns[rank] + 1
        missing = {place: Entry("s", place, "unreadable", f"rank {rank}") for place in fails.get((rank, turn), ()) if place not in known}
        return fake_batch(places, known | missing)

    batches = agree_on_threads([read(rank, {}) for rank in range(ranks)], read)
    assert len({tuple(batch.missing) for batch, _ in batches}) == 1
    assert len({tuple(entry.detail for entry in batch.failed) for batch, _ in batches}) == 1
    [missing] = {totals.missing for _, totals in batches}
    assert missing == len(batches[0][0].missing)
    if ranks > 1:
        assert set(batches[0][0].missing) >= set.union(*(fails[rank, 0] for rank in range(ranks)))


def fake_batch(places, missing):
    batch, _ = join_samples([], np.zeros((0, 4, 4, 3), np.uint8), None, SPEC, weighting="token")
    ids = tuple(("s", place) for place in range(places) if place not in missing)
    return LoadedPack(batch, ids, missing=dict(sorted(missing.items())))


def agree_on_threads(batches, read):
    """`agree` as every rank of one context group calls it, at once; each with one batch."""
    ranks, barrier, board = len(batches), threading.Barrier(len(batches)), {}

    def world(rank):
        def gather(value):
            board[rank] = value
            barrier.wait()
            values = [board[other] for other in range(ranks)]
            barrier.wait()
            return values

        group = SimpleNamespace(rank=rank, size=ranks)
        return SimpleNamespace(rank=rank, context=group, gather=gather, sum=lambda tensor: torch.stack(gather(tensor)).sum(0))

    def run(rank):
        [batch], totals = agree([batches[rank]], world(rank), lambda place, missing: read(rank, missing))
        return batch, totals

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, range(ranks)))


def test_targets_are_the_answers_and_their_end(packs, tokenizer):
    batch = load_pack(packs[0], CachedEncoder(tokenizer), SPEC, weighting="token").batch
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
        kept = batch.targets[start:stop] != IGNORE_INDEX
        assert tokenizer.decode(batch.targets[start:stop][kept]) in [f"{word}<|im_end|>" for word in ("red", "green", "blue", "noise")]
        follows = np.append(batch.input_ids[start + 1 : stop], -1)
        assert (follows[kept] == batch.targets[start:stop][kept]).all()
    assert batch.num_kept == (batch.targets != IGNORE_INDEX).sum() == batch.label_weight


def test_a_file_that_is_gone_is_missing_and_named(packs, tokenizer, tmp_path):
    pack = packs[0]
    place = next(place for place, planned in enumerate(pack) if planned.plan.grids)
    address = pack[place].address
    whole = load_pack(pack, CachedEncoder(tokenizer), SPEC)
    (tmp_path / f"{address.line - 1}.png").unlink()
    batch = load_pack(pack, CachedEncoder(tokenizer), SPEC)
    [entry] = batch.failed
    assert (entry.source, entry.line, entry.where) == ("rows", address.line, "train")
    assert f"{address.line - 1}.png" in entry.detail
    assert set(whole.sample_ids) - set(batch.sample_ids) == {("rows", address.line)}
    assert batch.batch.label_weight < whole.batch.label_weight
    assert batch.batch.label_weight == pytest.approx(batch.batch.token_weights.sum(dtype=np.float64))


def test_an_image_of_another_shape_than_planned_is_missing_and_named(packs, tokenizer, tmp_path):
    """Its tiles would be stretched: cut for one grid from a picture of another shape."""
    pack = packs[0]
    place = next(place for place, planned in enumerate(pack) if planned.plan.grids and planned.plan.sizes[0] == (64, 32))
    path = tmp_path / f"{pack[place].address.line - 1}.png"
    exif = Image.Exif()
    for orientation, failed in ((3, []), (6, ["changed"])):
        exif[0x0112] = orientation
        Image.new("RGB", (64, 32)).save(path, exif=exif)
        batch = load_pack(pack, CachedEncoder(tokenizer), SPEC)
        assert [entry.reason for entry in batch.failed] == failed
    assert f"{path.name}: is 32 x 64 as displayed, prepare measured 64 x 32" in batch.failed[0].detail
    assert batch.failed[0].line == pack[place].address.line


def test_a_row_that_changed_is_missing_and_named(packs, tokenizer, tmp_path):
    rows = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(rows.replace(b"what color?", b"what colour"))
    assert not load_pack(packs[0], CachedEncoder(tokenizer), SPEC).failed  # as long as before: still fits
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" * (len(rows) // 3))
    batch = load_pack(packs[0], CachedEncoder(tokenizer), SPEC)
    assert len(batch.failed) == len(packs[0])
    assert {entry.reason for entry in batch.failed} <= {"broken-json", "bad-row"}
    assert batch.sample_ids == ()
    assert batch.tokens == 0
    assert batch.batch.num_kept == 0
    assert batch.batch.label_weight == 0.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["token", "sample", "sqrt"]))
def test_weights_sum_to_what_the_weighting_says(tokenizer, counts, weighting):
    samples = []
    for count in counts:
        labels = np.full(count + 3, IGNORE_INDEX)
        labels[2 : 2 + count] = 7
        samples.append(Encoded(np.full(count + 3, 5), labels))
    batch, _ = join_samples(samples, np.zeros((0, 32, 32, 3), np.uint8), CachedEncoder(tokenizer), SPEC, weighting=weighting)
    expected = {"token": sum(counts), "sample": len(counts), "sqrt": sum(count**0.5 for count in counts)}[weighting]
    assert batch.label_weight == pytest.approx(expected, rel=1e-6)
    assert batch.num_kept == sum(counts)
    assert token_weight(counts[0], weighting) > 0
