"""Which packs a data parallel group reads, and in which order: the steps of all stages from a place in the run on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eagle_train.planning.stages import StageSchedule

from .loader import Task


@dataclass(frozen=True)
class Tasks:
    """The packs of data parallel group `rank` of `ranks`, as tasks with the key (stage number, step, place in the step)."""

    schedules: Sequence[StageSchedule]
    rank: int = 0
    ranks: int = 1

    def from_step(self, stage: int, step: int) -> Iterator[Task]:
        """All packs from step `step` of stage number `stage` on, through the last stage."""
        for number in range(stage, len(self.schedules)):
            for current in range(step if number == stage else 0, self.schedules[number].steps):
                yield from self.of_step(number, current)

    def of_step(self, stage: int, step: int) -> Iterator[Task]:
        """The packs of one step."""
        schedule = self.schedules[stage]
        plan, place_in_epoch = schedule.locate(step)
        for place, pack in enumerate(plan.packs_of(place_in_epoch, self.rank, self.ranks)):
            yield Task((stage, step, place), tuple(plan.samples(pack)), schedule.stage.loss_weighting)

    def one(self, stage: int, step: int, place: int) -> Task:
        """One pack of a step."""
        return next(itertools.islice(self.of_step(stage, step), place, None))
