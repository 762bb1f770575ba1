"""Contact sheets: what the model sees of a held-out row, as one small picture for trackers."""

from __future__ import annotations

import logging
from functools import cached_property

import numpy as np
from PIL import Image

from eagle_model.prompt import PromptError
from eagle_model.visual import MediaChanged, VisualPlans
from eagle_model.visual.read import read_tiles_into
from eagle_sampling import MediaError
from eagle_train.config import ConfigError
from eagle_train.data.facts import Facts
from eagle_train.data.measure import media_limits
from eagle_train.data.sample import RowError, load_sample
from eagle_train.evaluation.metrics import Answer
from eagle_train.planning.visual import plan_visual, sample_plan
from eagle_train.runs.ready import Ready

from .preview import find_row

logger = logging.getLogger(__name__)

SIDE, MOST, COLUMNS, GAP = 112, 12, 4, 2
"""Pixels of a tile on a sheet, tiles of a sheet, tiles in a row, and pixels between them."""


class SamplePictures:
    """Contact sheets of the held-out rows of a run, by answer. Media are read when a sheet is made."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready

    def __call__(self, answer: Answer) -> np.ndarray | None:
        """uint8 [h, w, 3]: at most 12 tiles or frames of the row, spread evenly; None without media, or when they can't be read."""
        facts, spec = self.ready.eval_facts, self.ready.spec
        assert facts is not None
        try:
            row = find_row(facts, f"{answer.source}:{answer.line}")
            plan = sample_plan(facts, self._plans, row, spec)
            count = plan.tile_count(spec)
            if not count:
                return None
            sample = load_sample(facts.address(row))
            chosen = np.unique(np.linspace(0, count - 1, min(count, MOST)).round().astype(int))
            tiles = np.empty((len(chosen), spec.tile_size, spec.tile_size, 3), np.uint8)
            limits = media_limits(self.ready.config.data.limits)
            runs = [(0, tiles)] if len(chosen) == count else [(int(first), tiles[place : place + 1]) for place, first in enumerate(chosen)]
            for first, part in runs:
                read_tiles_into(part, sample.messages, sample.images, sample.videos, plan, spec, first=first, limits=limits)
        except (ConfigError, RowError, MediaError, MediaChanged, PromptError, OSError, ValueError) as error:
            logger.debug("no picture of %s:%d: %s", answer.source, answer.line, error)
            return None
        return sheet(tiles)

    @cached_property
    def _plans(self) -> VisualPlans:
        facts: Facts | None = self.ready.eval_facts
        assert facts is not None
        return plan_visual(facts, self.ready.config.stages[-1].max_tokens, self.ready.spec)


def sheet(tiles: np.ndarray) -> np.ndarray:
    """Tiles, uint8 [n, s, s, 3], in rows on white: uint8 [h, w, 3]. Tiles of more than 112 pixels are reduced."""
    side = min(SIDE, tiles.shape[1])
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP), "white")
    for place, tile in enumerate(tiles):
        picture = Image.fromarray(tile).resize((side, side), Image.Resampling.BOX)
        page.paste(picture, (place % columns * (side + GAP), place // columns * (side + GAP)))
    return np.asarray(page)
