"""Packs become arrays: targets, weights and tiles are right, and what can't be read is missing and told, never replaced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_model.prompt import IGNORE_INDEX
from eagle_train.data.encoding import CachedEncoder
from eagle_train.data.prepare import prepare
from eagle_train.planning.stages import StageSchedule
from eagle_train.planning.visual import ModelFacts
from eagle_train.training.batch import Address, Planned, Tokenised, address_of, assemble, materialise, token_weight

MODEL = ModelFacts(32, 4)


@pytest.fixture
def packs(colour_run, tokenizer):
    """The packs of the first stage's first epoch."""
    config = colour_run()
    facts = prepare(config, tokenizer).facts
    plan = StageSchedule(facts, config, config.stages[0], MODEL).plan(0)
    return [tuple(Planned(address_of(facts, sample.row), sample) for sample in plan.samples(pack)) for pack in range(plan.packs)]


def test_every_row_comes_once_with_its_own_tiles(packs, tokenizer):
    encoder = CachedEncoder(tokenizer)
    seen = []
    for pack in packs:
        batch = materialise(pack, encoder, MODEL)
        assert not batch.failed
        seen += batch.sample_ids
        assert batch.tokens == batch.cu_seqlens[-1] <= batch.planned_tokens <= 640
        assert len(batch.context_index) == 4 * len(batch.tiles)
        assert (batch.input_ids[batch.context_index] == encoder.token_id("<IMG_CONTEXT>")).all()
        tile = 0
        for (_, line), start, stop in zip(batch.sample_ids, batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
            inside = (batch.context_index >= start) & (batch.context_index < stop)
            count = int(inside.sum()) // 4
            if line <= 24:  # images of one colour, in the order in which they were written
                expected = [(255, 0, 0), (0, 160, 0), (0, 0, 255)][(line - 1) % 3]
                assert (batch.tiles[tile : tile + count] == np.array(expected)).all()
                assert count == (1 if (line - 1) % 2 else 3)
            tile += count
            assert (batch.position_ids[start:stop] == np.arange(stop - start)).all()
    assert sorted(line for _, line in seen) == list(range(1, 26))


def test_targets_are_the_answers_and_their_end(packs, tokenizer):
    batch = materialise(packs[0], CachedEncoder(tokenizer), MODEL, weighting="token")
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
    whole = materialise(pack, CachedEncoder(tokenizer), MODEL)
    (tmp_path / f"{address.line - 1}.png").unlink()
    batch = materialise(pack, CachedEncoder(tokenizer), MODEL)
    [entry] = batch.failed
    assert (entry.source, entry.line, entry.where) == ("rows", address.line, "train")
    assert f"{address.line - 1}.png" in entry.detail
    assert set(whole.sample_ids) - set(batch.sample_ids) == {("rows", address.line)}
    assert batch.label_weight < whole.label_weight
    assert batch.label_weight == pytest.approx(batch.token_weights.sum(dtype=np.float64))


def test_a_row_that_changed_is_missing_and_named(packs, tokenizer, tmp_path):
    rows = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(rows.replace(b"what color?", b"what colour"))
    assert not materialise(packs[0], CachedEncoder(tokenizer), MODEL).failed  # as long as before: still fits
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" * (len(rows) // 3))
    batch = materialise(packs[0], CachedEncoder(tokenizer), MODEL)
    assert len(batch.failed) == len(packs[0])
    assert {entry.reason for entry in batch.failed} <= {"broken-json", "bad-row"}
    assert batch.sample_ids == ()
    assert batch.tokens == 0
    assert batch.num_kept == 0
    assert batch.label_weight == 0.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["token", "sample", "sqrt"]))
def test_weights_sum_to_what_the_weighting_says(tokenizer, counts, weighting):
    samples = []
    for number, count in enumerate(counts):
        labels = np.full(count + 3, IGNORE_INDEX)
        labels[2 : 2 + count] = 7
        address = Address("s", number, "", 0, 0, "", None)
        samples.append((address, Tokenised(np.full(count + 3, 5), labels)))
    batch = assemble(samples, np.zeros((0, 32, 32, 3), np.uint8), CachedEncoder(tokenizer), MODEL, weighting=weighting)
    expected = {"token": sum(counts), "sample": len(counts), "sqrt": sum(count**0.5 for count in counts)}[weighting]
    assert batch.label_weight == pytest.approx(expected, rel=1e-6)
    assert batch.num_kept == sum(counts)
    assert token_weight(counts[0], weighting) > 0
