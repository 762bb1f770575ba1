"""Plans stay what they were, bit by bit: a run that resumes under a newer version continues with the packs it began with.

The hashes were computed on 2026-11-28 by the version before plans were made in parts and stored.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from eagle_model.visual import VisualSpec
from eagle_train.config import StageConfig
from eagle_train.data.facts import FactsSource
from eagle_train.planning.stages import plan_stage

SPEC = VisualSpec()
VISUAL = ("status", "tokens", "tiles", "image_caps", "image_tiles", "frames", "wanted")
PACKS = ("pack_offsets", "pack_rows", "drop_rows", "pack_items")


def digest(arrays):
    """A hash of integer arrays by their values, whatever their width."""
    result = hashlib.blake2b(digest_size=8)
    for array in arrays:
        result.update(np.asarray(array).astype(np.int64).tobytes())
    return result.hexdigest()


@pytest.fixture(scope="module")
def facts(make_facts):
    """60 000 rows in three sources: text, images, videos and pages; some too long; 2000 rows that share media."""
    rng = np.random.default_rng(7)
    rows = []
    for number in range(60_000):
        row = {"text": int(rng.integers(20, 900)), "labels": 5}
        kind = number % 8
        if kind in (1, 2):
            row["images"] = [(int(w), int(h)) for w, h in rng.integers(50, 3000, (kind, 2))]
        elif kind == 3:
            row["images"] = [(640, 480)] * int(rng.integers(1, 60))
        elif kind == 4:
            row["videos"] = [(int(rng.integers(1, 400)), 10)] * int(rng.integers(1, 4))
        elif kind == 5:
            row |= {"videos": [int(rng.integers(1, 30)), (50, 5)], "images": [(900, 300)]}
        elif kind == 6 and number < 16_000:
            row |= {"images": [(1000, 1000)], "group": 1 + number // 64}
        elif kind == 7 and number % 80 == 7:
            row["text"] = int(rng.integers(3000, 20_000))
        rows.append(row)
    firsts, sources = (0, 25_000, 25_000, 60_000), []
    options = ((1.0, 1.0, None), (1.0, 1.0, 4), (1.5, 1.25, 6))
    for name, first, stop, (repeat, weight, tiles) in zip("abc", firsts, firsts[1:], options):
        sources.append(FactsSource(name, Path(name), Path("."), first, stop - first, 0, repeat, weight, tiles))
    return make_facts(rows, sources)


@pytest.mark.parametrize(
    ("tokens", "epoch", "share_media", "strategy", "visual", "packs"),
    [
        (4096, 0, False, "ads", "18b1b076c8f34c36", "d22e4dcf134bd4e9"),
        (8192, 1, True, "ads", "d609e2de8eb160ec", "f499069f164e057b"),
        (16384, 0, False, "ads-fill", "04d13b63e9d9670c", "9b3f15be8ac8598a"),
        (16384, 2, True, "uniform", "1b4e2d87c264da2e", "38182a5dd3bd5eca"),
    ],
)
def test_plans_are_those_of_earlier_versions(facts, tokens, epoch, share_media, strategy, visual, packs):
    stage = StageConfig(name="s", max_tokens=tokens, packs_per_step=16)
    spec = VisualSpec(strategy=strategy)
    plan = plan_stage(facts, stage, spec, seed=3, epoch=epoch, share_media=share_media)
    assert digest(getattr(plan.visual, name) for name in VISUAL) == visual
    assert digest(getattr(plan, name) for name in PACKS) == packs


def test_messages_of_dropped_rows_are_those_of_earlier_versions(facts):
    plan = plan_stage(facts, StageConfig(name="s", max_tokens=4096), SPEC, share_media=True)
    entries = hashlib.blake2b(repr(list(plan.drops())).encode(), digest_size=8).hexdigest()
    assert (len(plan.drop_rows), entries) == (17959, "85054a5c83a7157f")
