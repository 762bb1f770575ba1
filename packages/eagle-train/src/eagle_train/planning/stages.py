"""A stage as a plan: which rows an epoch shows, in which packs, in which order of steps.

`plan_stage` is a pure function of (facts, stage, seed, epoch), identical on every rank; resuming is an index into it.

How often a row comes: `repeat_time` of its recipe entry (whole copies, and for the fractional part the same rows in every epoch),
times the source's weight (the stage's, else the recipe's; its fractional part is drawn anew in every epoch); or as `mixture` says.
Steps are groups of `packs_per_step` packs. Within a step packs are sorted by cost, so that `packs_of` hands ranks packs of about
the same cost at the same time. With a cost model (`costs.CostModel`) packs and steps are balanced by FLOPs, else by tokens.
The last step is made whole by splitting packs; only when every pack holds a single sample, and none can be split, are some packs of an
epoch empty.
"""

import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eagle_model.visual import SamplePlan, VisualPlans, VisualSpec
from eagle_train.config import Config, StageConfig
from eagle_train.data.facts import Facts, FactsSource
from eagle_train.data.ledger import Entry
from eagle_train.data.sample import Address
from eagle_train.data.shared import shared_arrays

from .balance import deal_steps
from .costs import CostModel, Work, spread, work_of
from .mixture import Pool, SourceDraws, count_draws, draw_mixture
from .packing import Packs, pack, sample_costs, shuffled
from .stored import can_be_kept, epoch_file, narrow, shared_visual
from .trees import expand, make_trees, media_groups, media_tokens
from .visual import drop_details, plan_visual, sample_plan


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

        Raises ValueError when the packs of a step can't be shared evenly, naming the numbers that can.
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
        """`costs.spread` over data groups. Raises ValueError when the packs of a step can't be shared evenly."""
        check_groups(self.stage, groups)
        return spread(self.pack_costs(costs), self.stage.packs_per_step, groups)

    def _cost_spread(self) -> float:
        if not self.packs:
            return 1.0
        costs = self.pack_costs().reshape(self.steps, -1)
        return float(np.mean(costs.max(axis=1) / np.maximum(costs.mean(axis=1), 1e-9)))


def plan_stage(
    facts: Facts,
    stage: StageConfig,
    spec: VisualSpec,
    *,
    seed: int = 0,
    epoch: int = 0,
    visual: VisualPlans | None = None,
    share_media: bool = False,
    costs: CostModel | None = None,
) -> StagePlan:
    """Plan one epoch of a stage.

    costs: what packs and steps are balanced by; default: tokens.
    share_media: rows with the same media become trees (`packing.share_media`). visual: the stage's visual plan when it is already known (it
    does not depend on the epoch, but on share_media); computed otherwise.
    An epoch that drew only rows that don't fit, by chance, has no steps. Raises ValueError when no epoch draws a row that fits the stage.
    """
    if visual is None:
        visual = plan_visual(facts, stage.max_tokens, spec, share_media=share_media)
    rows, dropped = choose_rows(facts, stage, visual, seed, epoch)
    if not len(rows) and not np.any(visual.status[drawable_rows(facts, stage, seed)] == 0):
        raise nothing_to_train(facts, stage, visual, seed)
    mixed = (seed * 1_000_003 + epoch) * 1_000_003 + zlib.crc32(stage.name.encode())
    groups = media_groups(facts) if share_media else None
    shared = media_tokens(facts, visual) if share_media else None
    trees, lengths = make_trees(rows, groups, visual.tokens, shared, stage.max_tokens)
    weights = sample_costs(lengths)
    if costs is not None:
        labels = facts.column("label_tokens")[rows]
        once = shared[rows] if shared is not None else np.zeros(len(rows), np.int64)
        weights = costs.of(work_of(trees, visual.tokens[rows], labels, visual.tiles[rows], once))
    packs = pack(lengths, stage.max_tokens, costs=weights if costs is not None else None, seed=mixed)
    packs = whole_steps(packs, lengths, weights, stage.packs_per_step)
    packs = order_steps(packs, weights, stage.packs_per_step, mixed, deal=costs is not None)
    packs, items = expand(packs, trees)
    return StagePlan(stage, epoch, facts, spec, visual, packs.offsets, rows[packs.items], dropped, items, costs)


def nothing_to_train(facts: Facts, stage: StageConfig, visual: VisualPlans, seed: int) -> ValueError:
    """The error of a stage without a step."""
    drawable = np.unique(drawable_rows(facts, stage, seed))
    return ValueError(
        f"stage {stage.name}: none of {len(facts)} rows can be used ({np.count_nonzero(visual.status[drawable])} do not fit "
        f"{stage.max_tokens} tokens, {len(facts) - len(drawable)} are never drawn); raise max_tokens, or check the ledger and the "
        "stage's sources, their repeat_time and weight"
    )


def choose_rows(facts: Facts, stage: StageConfig, visual: VisualPlans, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that an epoch trains, int64 [S], in the facts' order, a row as often as it comes; and those that would be drawn and don't fit.

    With a mixture shares are of rows that fit, so that long rows don't make a source small."""
    if stage.mixture is None:
        drawn = draw_rows(facts, stage, seed, epoch)
        fits = visual.status[drawn] == 0
        return drawn[fits], np.unique(drawn[~fits])
    pools, seeds, dropped = [], [], [np.zeros(0, np.int64)]
    for source, weight, base in _sources_of(facts, stage, seed):
        rows = base + source.first
        fits = visual.status[rows] == 0
        dropped.append(np.unique(rows[~fits]))
        rows = rows[fits]
        costs = visual.tokens[rows].astype(np.int64) if stage.mixture.count == "tokens" else np.ones(len(rows), np.int64)
        pools.append(Pool(source.name, weight, rows, costs))
        seeds.append((seed * 1_000_003 + zlib.crc32(source.name.encode())) * 1_000_003 + zlib.crc32(stage.name.encode()))
    return draw_mixture(pools, stage.mixture, stage.name, seeds, epoch), np.concatenate(dropped)


def draw_rows(facts: Facts, stage: StageConfig, seed: int, epoch: int) -> np.ndarray:
    """Rows that an epoch of a stage without a mixture shows, int64 [S], in the facts' order, a row as often as it comes."""
    parts = [np.zeros(0, np.int64)]
    for source, weight, base in _sources_of(facts, stage, seed):
        name = zlib.crc32(source.name.encode())
        shown = _times(base, weight, ((seed * 1_000_003 + name) * 1_000_003 + zlib.crc32(stage.name.encode())) * 1_000_003 + epoch)
        parts.append(np.sort(shown) + source.first)
    return np.concatenate(parts)


def drawable_rows(facts: Facts, stage: StageConfig, seed: int) -> np.ndarray:
    """Rows that some epoch of the stage shows, int64."""
    shown = [
        base + source.first
        for source, weight, base in _sources_of(facts, stage, seed)
        if stage.mixture is not None or len(_times(base, weight, 0))
    ]
    return np.concatenate([np.zeros(0, np.int64), *shown])


def _sources_of(facts: Facts, stage: StageConfig, seed: int) -> Iterator[tuple[FactsSource, float, np.ndarray]]:
    """The stage's sources with their weights, and the rows that repeat_time makes of each, int64, counted within the source."""
    weights = stage.source_weights
    for source in facts.sources:
        weight = source.weight if weights is None else weights.get(source.name)
        if weight is not None and source.rows:
            rows = np.arange(source.rows, dtype=np.int64)
            yield source, weight, _times(rows, source.repeat_time, seed * 1_000_003 + zlib.crc32(source.name.encode()))


def _times(rows: np.ndarray, factor: float, seed: int) -> np.ndarray:
    """`rows` repeated `factor` times; the fractional part picks round(fraction * N) of them by hash, none twice."""
    whole = int(factor)
    some = round((factor - whole) * len(rows))
    picked = rows[shuffled(len(rows), seed)[:some]] if some else rows[:0]
    return np.concatenate([np.repeat(rows, whole), picked])


def pack_costs(weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Cost of each pack, float64 [P], for the costs of its samples in pack order."""
    total = np.concatenate([[0.0], np.cumsum(weights)])
    return total[offsets[1:]] - total[offsets[:-1]]


def check_groups(stage: StageConfig, groups: int) -> None:
    """Raises ValueError when the packs of a step can't be shared evenly by `groups` data-parallel groups, naming the numbers that can."""
    per_step = stage.packs_per_step
    if per_step % groups:
        lower, upper = per_step // groups * groups, -(-per_step // groups) * groups
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise ValueError(
            f"stage {stage.name}: packs_per_step is {per_step}, which {groups} data-parallel groups can't share evenly; set it to {near}"
        )


def whole_steps(packs: Packs, lengths: np.ndarray, weights: np.ndarray, packs_per_step: int) -> Packs:
    """Split packs (the costliest first, samples dealt alternately) until steps are whole; add empty packs when samples run out."""
    while missing := -len(packs) % packs_per_step:
        counts = np.diff(packs.offsets)
        costs = np.where(counts > 1, pack_costs(weights[packs.items], packs.offsets), -1.0)
        split = np.argsort(-costs, kind="stable")[:missing]
        split = split[costs[split] > 0]
        if not len(split):
            return Packs(np.concatenate([packs.offsets, np.full(missing, packs.offsets[-1])]), packs.items)
        owner = np.repeat(np.arange(len(packs)), counts)
        for new, index in enumerate(split.tolist(), start=len(packs)):
            first, last = packs.offsets[index : index + 2]
            longest_first = first + np.argsort(-lengths[packs.items[first:last]], kind="stable")
            owner[longest_first[1::2]] = new
        items = packs.items[np.argsort(owner, kind="stable")]
        packs = Packs(np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(packs) + len(split)))]), items)
    return packs


def order_steps(packs: Packs, weights: np.ndarray, packs_per_step: int, seed: int, *, deal: bool = False) -> Packs:
    """Shuffle packs into steps; within a step the costliest pack comes first. deal: by `balance.deal_steps`."""
    order = shuffled(len(packs), seed + 1).reshape(-1, packs_per_step)
    costs = pack_costs(weights[packs.items], packs.offsets)
    if deal and len(order):
        order = deal_steps(order, costs, shuffled(len(packs), seed + 2))
    order = np.take_along_axis(order, np.argsort(-costs[order], axis=1, kind="stable"), axis=1).ravel()
    counts = np.diff(packs.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    return Packs(offsets, packs.items[np.repeat(packs.offsets[:-1][order], counts) + within])


class StageSchedule:
    """All epochs of a stage as one run of steps; plans of epochs are made when they are needed and the last two are kept.

    folder: where plans are found, or made by one process for all that map them; None: plans are made in this process.
    Threads may share it (the loader's is ahead of the trainer's): one plans, and the others wait for it.
    """

    def __init__(
        self,
        facts: Facts,
        config: Config,
        stage: StageConfig,
        spec: VisualSpec,
        *,
        folder: Path | None = None,
        costs: CostModel | None = None,
    ) -> None:
        self.stage, self.costs = stage, costs
        self.facts, self.spec, self._seed = facts, spec, config.run.seed
        self._share_media = config.packing.share_media
        self._folder = folder if can_be_kept(facts, spec) else None
        self._reserve = config.packing.reserve if self._share_media else 0.0
        self.visual = shared_visual(self._folder, facts, stage.max_tokens, spec, share_media=self._share_media, reserve=self._reserve)
        self._lock = threading.RLock()  # of the two below
        self._plans: dict[int, StagePlan] = {}
        self._ends: list[int] = []  # steps until the end of epoch e
        if stage.steps is not None:
            self.steps = stage.steps
        else:
            epochs = stage.epochs if stage.epochs is not None else 1.0
            whole = int(epochs)
            self.steps = self._end(whole - 1) if whole else 0
            if epochs > whole and (last := self.plan(whole).steps):
                self.steps += max(1, round((epochs - whole) * last))
        if not self.steps:
            raise nothing_to_train(facts, stage, self.visual, self._seed)

    def plan(self, epoch: int) -> StagePlan:
        """The plan of one epoch."""
        with self._lock:
            if epoch not in self._plans:
                while len(self._plans) > 1:
                    del self._plans[next(iter(self._plans))]
                self._plans[epoch] = self._plan(epoch)
            return self._plans[epoch]

    def by_tokens(self) -> StagePlan:
        """The plan of the first epoch if every token cost the same: what balancing by cost is compared with."""
        return plan_stage(self.facts, self.stage, self.spec, seed=self._seed, visual=self.visual, share_media=self._share_media)

    def _plan(self, epoch: int) -> StagePlan:
        options = {"seed": self._seed, "epoch": epoch, "share_media": self._share_media, "costs": self.costs}

        def make() -> StagePlan:
            return plan_stage(self.facts, self.stage, self.spec, visual=self.visual, **options)

        if self._folder is None:
            return make()
        path = epoch_file(self._folder, self.facts, self.stage, self.spec, reserve=self._reserve, **options)
        arrays = shared_arrays(path, lambda: narrow(make().arrays()))
        return StagePlan(self.stage, epoch, self.facts, self.spec, self.visual, **arrays, costs=self.costs)

    def locate(self, step: int) -> tuple[StagePlan, int]:
        """The plan that step `step` (0-based, of the whole stage) belongs to, and the step within it."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not in 0 ... {self.steps - 1} of stage {self.stage.name}")
        epoch = 0
        with self._lock:
            while step >= self._end(epoch):
                epoch += 1
            return self.plan(epoch), step - (self._end(epoch - 1) if epoch else 0)

    def times_drawn(self) -> np.ndarray:
        """How often every row of the facts is trained in all steps of the stage, int64 [rows]; plans all of its epochs."""
        times, step = np.zeros(len(self.facts), np.int64), 0
        while step < self.steps:
            plan, _ = self.locate(step)
            steps = min(plan.steps, self.steps - step)
            rows = plan.pack_rows[: plan.pack_offsets[steps * self.stage.packs_per_step]]
            times += np.bincount(rows, minlength=len(times))
            step += steps
        return times

    def _end(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            self._ends.append((self._ends[-1] if self._ends else 0) + self.plan(len(self._ends)).steps)
        return self._ends[epoch]
