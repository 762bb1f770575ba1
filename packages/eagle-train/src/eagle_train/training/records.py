"""Records of a run: the metrics of every step, written when its loss has arrived, and those of evaluations.

A step's loss and gradient norm are read when the work of the next step is queued, for which the host waits (so the time of a step is that
of the device), and before anything is saved; those of the first step at once, so that a run shows soon that it works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle_train.config import Config
from eagle_train.data.ledger import Ledger
from eagle_train.distributed.world import World
from eagle_train.errors import TrainError
from eagle_train.planning.stages import StageSchedule

from .metrics import Metrics
from .source_losses import SourceLosses, by_source
from .speed import memory, peak_flops
from .startup import StartUp


class TrainingError(TrainError, RuntimeError):
    """The run cannot continue: the message has the step, the samples in it, and the next step to try."""


@dataclass(frozen=True)
class Pending:
    """A step whose loss and gradient norm may not have been copied from the device yet."""

    record: dict[str, Any]
    loss: Tensor
    norm: Tensor
    sources: SourceLosses
    sample_ids: list[tuple[str, int]]


class Records:
    """Of a run in `folder`. on_record: called on the main rank with every record. startup: its phases are in the first record of a step."""

    def __init__(
        self,
        config: Config,
        schedules: Sequence[StageSchedule],
        world: World,
        on_record: Callable[[dict[str, Any]], None] | None,
        startup: StartUp,
    ) -> None:
        self.config, self.schedules, self.world, self.on_record = config, schedules, world, on_record
        self.folder: Path = config.run.folder
        self.metrics = Metrics(self.folder / "metrics.jsonl")
        self._pending: Pending | None = None
        self._pace: float | None = None
        self.startup: StartUp | None = startup
        self._start: dict[str, Any] = {}
        self._peak = peak_flops(world.device, config.parallel.dtype)

    @property
    def starting(self) -> bool:
        """Whether no step of this process has a record."""
        return self.startup is not None

    def write(self, record: dict[str, Any]) -> None:
        """Append a record now."""
        self.metrics.write(record)
        if self.on_record is not None:
            self.on_record(record)

    def hold(self, pending: Pending, speed: dict[str, Any]) -> None:
        """A step that is done on the host, and what is known of its speed, for the next `settle`."""
        self._pending = replace(pending, record=pending.record | speed)

    def settle(self) -> None:
        """Wait for the device, and write the record of the step that is held, with its loss and gradient norm.

        A collective of all ranks. Raises TrainingError on all of them when one of the two is not finite.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        sums = torch.cat([pending.loss.double().reshape(1), pending.sources.sums.flatten()]).cpu()
        self.world.sum(sums)
        if self.startup is not None:
            self.startup.over("first step")
            self.startup, self._start = None, {"start": self.startup.phases}
        loss, names = sums[0].item(), pending.sources.names
        norm, stage, step = float(pending.norm), pending.record["stage"], pending.record["step"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ids = sorted({f"{source}:{line}" for some in self.world.gather(pending.sample_ids) for source, line in some})
            shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
            raise TrainingError(
                f"stage {stage} step {step}: loss {loss}, gradient norm {norm}. Samples of the step: {shown}. "
                "The last checkpoint is older than this step. Lower stages.*.lr, or inspect these rows with eagle show"
            )
        if self.world.is_main and (step % self.config.run.log_every == 0 or step == pending.record["steps"]):
            losses = by_source(names, sums[1:].view(2, -1)) if len(names) > 1 else {}
            losses = {"losses": losses} if losses else {}
            start, self._start = self._start, {}
            self.write(pending.record | {"loss": loss, "grad_norm": norm, "eta": self._left(pending.record)} | losses | start)

    def use(self, rate: float) -> dict[str, Any]:
        """What a rank does with its device, at `rate` FLOP/s."""
        now, most = memory(self.world.device)
        use: dict[str, Any] = {"tflops": rate / 1e12, "memory": now, "memory_peak": most}
        return use if self._peak is None else use | {"mfu": rate / self._peak}

    def rewind(self, total_step: int) -> None:
        """Remove what any rank wrote after a step of the run: it is written again."""
        self.metrics.rewind(total_step)
        for path in self.folder.glob("ledger-train*.jsonl"):
            Ledger(path).rewind(total_step)

    def _left(self, record: dict[str, Any]) -> float:
        """Seconds to the end of the run: what is left in tokens of capacity, at the pace of the last steps."""
        room = [schedule.stage.max_tokens * schedule.stage.packs_per_step for schedule in self.schedules]
        names = [schedule.stage.name for schedule in self.schedules]
        number = names.index(record["stage"])
        pace = record["seconds"] / room[number]
        self._pace = pace if self._pace is None else 0.9 * self._pace + 0.1 * pace
        left = (record["steps"] - record["step"]) * room[number]
        left += sum(schedule.steps * size for schedule, size in list(zip(self.schedules, room))[number + 1 :])
        return left * self._pace
