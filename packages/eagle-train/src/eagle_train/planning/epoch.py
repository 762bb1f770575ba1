"""One epoch of a stage as a plan: its packs and their samples, what a step and a rank have of them, and its numbers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from eagle_model.visual import SamplePlan, VisualPlans, VisualSpec
from eagle_train.config import StageConfig
from eagle_train.data.facts import Facts
from eagle_train.data.ledger import Entry
from eagle_train.data.sample import Address

from .costs import CostModel, Work, spread, work_of
from .mixture import SourceDraws, count_draws
from .packing import Packs, sample_costs
from .steps import check_groups, pack_costs
from .trees import media_tokens
from .visual import drop_details, sample_plan


class Planned(NamedTuple):
    """A sample of a pack: the address of its row, and the plan of its media. tree: a number that samples with the same media share, which
    are in the pack once (`packing.share_media`); None: the sample has its media for itself. media_tokens: tokens of `plan` that are of its
    media, with the text around frames and tiles."""

    address: Address
    plan: SamplePlan
    tree: int | None = None
    media_tokens: int = 0


def pack_tokens(pack: Sequence[Planned]) -> int:
    """Tokens of a pack by its plan, an upper bound: the media of a tree once."""
    return sum(planned.plan.tokens - (planned.media_tokens if follows(pack, place) else 0) for place, planned in enumerate(pack))


def pack_tiles(pack: Sequence[Planned], spec: VisualSpec) -> int:
    """Tiles of a pack by its plan: those of a tree once."""
    return sum(planned.plan.tile_count(spec) for place, planned in enumerate(pack) if not follows(pack, place))


def follows(pack: Sequence[Planned], place: int) -> bool:
    """Whether the sample at `place` is in a tree with the sample before it."""
    return place > 0 and pack[place].tree is not None and pack[place].tree == pack[place - 1].tree


@dataclass(frozen=True)
class PlanSummary:
    """Numbers of one epoch of a stage. `rows` = `rows_used` + `rows_dropped` + `rows_left_out` (sources or shares not drawn)."""

    rows: int
    rows_used: int
    rows_dropped: int
    rows_left_out: int
    samples: int
    packs: int
    steps: int
    tokens: int
    label_tokens: int
    tiles: int
    frames: int
    fill: float
    longest_sample: int
    samples_per_pack: float
    cost_spread: float
    """Mean over micro-steps of (costliest pack / mean pack), for as many ranks as a step has packs."""
    drops: dict[str, int]


@dataclass(frozen=True, eq=False)
class StagePlan:
    """One epoch of a stage.

    Integers are int64, or int32 from a file.
    pack_offsets: [P + 1]; pack_rows: [S], rows of the facts; pack p holds pack_rows[pack_offsets[p]:pack_offsets[p + 1]].
    pack_items: [S], which samples of a pack are one tree: those with the same number, which follow one another.
    costs: what packs and steps are balanced by; None: tokens.
    Step s is packs s * packs_per_step ... (s + 1) * packs_per_step - 1. A row may come several times (repeat_time, weight).
    """

    stage: StageConfig
    epoch: int
    facts: Facts
    spec: VisualSpec
    visual: VisualPlans
    pack_offsets: np.ndarray
    pack_rows: np.ndarray
    drop_rows: np.ndarray
    pack_items: np.ndarray
    costs: CostModel | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """What is the plan's own: packs, rows and drops."""
        return {name: getattr(self, name) for name in ("pack_offsets", "pack_rows", "drop_rows", "pack_items")}

    @property
    def packs(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def steps(self) -> int:
        return self.packs // self.stage.packs_per_step

    def rows(self) -> np.ndarray:
        """Distinct rows of the facts in the epoch, int64, rising."""
        shown = np.zeros(len(self.facts), bool)
        shown[self.pack_rows] = True
        return np.flatnonzero(shown)

    def rows_of(self, pack: int) -> np.ndarray:
        """Rows of the facts in pack `pack`, int64 [samples]."""
        return self.pack_rows[self.pack_offsets[pack] : self.pack_offsets[pack + 1]]

    def packs_of(self, step: int, rank: int = 0, ranks: int = 1) -> range:
        """Packs that data rank `rank` of `ranks` trains in step `step`, one per micro-step (accumulation).

        Raises ConfigError when the packs of a step can't be shared evenly, naming the numbers that can.
        """
        check_groups(self.stage, ranks)
        per_step = self.stage.packs_per_step
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not in 0 ... {self.steps - 1} of epoch {self.epoch}")
        return range(step * per_step + rank, (step + 1) * per_step, ranks)

    def samples(self, pack: int) -> list[Planned]:
        """All samples of a pack, in order (none, where an epoch ran out of samples for its last step)."""
        items = self.pack_items[self.pack_offsets[pack] : self.pack_offsets[pack + 1]].tolist()
        sizes = Counter(items)
        rows = self.rows_of(pack)
        plans = [sample_plan(self.facts, self.visual, row, self.spec) for row in rows.tolist()]
        return [
            Planned(self.facts.address(row), plan, item if sizes[item] > 1 else None, media)
            for row, plan, item, media in zip(rows.tolist(), plans, items, media_tokens(self.facts, self.visual, rows).tolist())
        ]

    @cached_property
    def _items(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the trees and of samples alone, in pack order: first sample (its place in pack_rows), tokens; and the offsets of packs in
        them."""
        changed = np.diff(self.pack_items, prepend=-1) != 0
        first = np.flatnonzero(changed)
        own = self.visual.tokens[self.pack_rows] - np.where(changed, 0, media_tokens(self.facts, self.visual, self.pack_rows))
        total = np.concatenate([[0], np.cumsum(own)])
        tokens = total[np.append(first[1:], len(own))] - total[first] if len(own) else own
        return first, tokens, np.concatenate([[0], np.cumsum(changed)])[self.pack_offsets]

    def drops(self) -> Iterator[Entry]:
        """Ledger entries of the rows that this stage could not fit."""
        lines = self.facts.column("line")
        for row, why in zip(self.drop_rows.tolist(), drop_details(self.facts, self.visual, self.drop_rows, self.spec)):
            reason = self.visual.reasons[self.visual.status[row]]
            detail = f"{why}; raise the stage's max_tokens, or shorten the row"
            yield Entry(self.facts.source_of(row).name, int(lines[row]), reason, detail, f"stage {self.stage.name}")

    def draws(self) -> list[SourceDraws]:
        """What the epoch takes from each source that it uses."""
        return count_draws(self.facts, self.visual.tokens, self.visual.status == 0, self.pack_rows)

    def summary(self) -> PlanSummary:
        """Counts, fill and balance; a few column sums."""
        used = self.rows()
        first, tokens, _ = self._items
        media = self.pack_rows[first]  # rows whose media are read: one of each tree
        frames = np.concatenate([[0], np.cumsum(self.visual.frames, dtype=np.int64)])
        frames = frames[self.visual.video_offsets[1:]] - frames[self.visual.video_offsets[:-1]]
        reasons = Counter(self.visual.status[self.drop_rows].tolist())
        return PlanSummary(
            rows=len(self.facts),
            rows_used=len(used),
            rows_dropped=len(self.drop_rows),
            rows_left_out=len(self.facts) - len(used) - len(self.drop_rows),
            samples=len(self.pack_rows),
            packs=self.packs,
            steps=self.steps,
            tokens=int(tokens.sum()),
            label_tokens=int(self.facts.column("label_tokens")[self.pack_rows].sum()),
            tiles=int(self.visual.tiles[media].sum()),
            frames=int(frames[media].sum()),
            fill=float(tokens.sum() / (self.packs * self.stage.max_tokens)) if self.packs else 0.0,
            longest_sample=int(self.visual.tokens[self.pack_rows].max(initial=0)),
            samples_per_pack=len(self.pack_rows) / self.packs if self.packs else 0.0,
            cost_spread=self._cost_spread(),
            drops={self.visual.reasons[code]: number for code, number in sorted(reasons.items())},
        )

    def work(self) -> Work:
        """What each pack consists of."""
        first, _, offsets = self._items
        shared = media_tokens(self.facts, self.visual, self.pack_rows)
        trees = Packs(np.append(first, len(self.pack_rows)), np.arange(len(self.pack_rows)))
        rows = self.pack_rows
        labels = self.facts.column("label_tokens")[rows]
        return work_of(trees, self.visual.tokens[rows], labels, self.visual.tiles[rows], shared).joined(offsets)

    def pack_costs(self, costs: CostModel | None = None) -> np.ndarray:
        """Cost of each pack under `costs` (default: the plan's own), float64 [P]: FLOPs; without a model, tokens' worth of linear work."""
        model = costs or self.costs
        if model is not None:
            return model.of(self.work())
        _, tokens, offsets = self._items
        return pack_costs(sample_costs(tokens), offsets)

    def step_flops(self, step: int) -> float:
        """FLOPs of a step (forward and backward, without recomputation), of all packs; 0 without a cost model."""
        if self.costs is None:
            return 0.0
        return float(self._costs[step * self.stage.packs_per_step : (step + 1) * self.stage.packs_per_step].sum())

    @cached_property
    def _costs(self) -> np.ndarray:
        return self.pack_costs()

    def spread(self, groups: int, costs: CostModel | None = None) -> float:
        """`costs.spread` over data groups. Raises ConfigError when the packs of a step can't be shared evenly."""
        check_groups(self.stage, groups)
        return spread(self.pack_costs(costs), self.stage.packs_per_step, groups)

    def _cost_spread(self) -> float:
        if not self.packs:
            return 1.0
        costs = self.pack_costs().reshape(self.steps, -1)
        return float(np.mean(costs.max(axis=1) / np.maximum(costs.mean(axis=1), 1e-9)))
