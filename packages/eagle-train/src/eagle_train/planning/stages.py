"""A stage as a plan: which rows an epoch shows, in which packs, in which order of steps.

`plan_stage` is a pure function of (facts, stage, seed, epoch), identical on every rank; resuming is an index into it. Rows are drawn
(`draws`), rows with the same media become trees (`trees`), these are packed (`packing`) and packs put into steps (`steps`); the result is
an `epoch.StagePlan`. Within a step packs are sorted by cost, so that `packs_of` hands ranks packs of about the same cost at the same time.
With a cost model (`costs.CostModel`) packs and steps are balanced by FLOPs, else by tokens.
"""

import threading
import zlib
from pathlib import Path

import numpy as np

from eagle_model.visual import VisualPlans, VisualSpec
from eagle_train.config import Config, StageConfig
from eagle_train.data.facts import Facts
from eagle_train.data.shared import shared_arrays

from .costs import CostModel, work_of
from .draws import choose_rows, drawable_rows, nothing_to_train
from .epoch import Planned, PlanSummary, StagePlan, follows, pack_tiles, pack_tokens
from .packing import pack, sample_costs
from .steps import check_groups, order_steps, whole_steps
from .stored import can_be_kept, epoch_file, narrow, shared_visual
from .trees import expand, make_trees, media_groups, media_tokens
from .visual import plan_visual

__all__ = [
    "PlanSummary",
    "Planned",
    "StagePlan",
    "StageSchedule",
    "check_groups",
    "follows",
    "pack_tiles",
    "pack_tokens",
    "plan_stage",
]


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
