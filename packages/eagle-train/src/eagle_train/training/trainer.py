"""The loop: stages in order, each step a number of packs over all ranks, every label counted once whoever reads it.

One optimizer step of a rank: its packs of the step one after the other (accumulation), each loss divided by the label weights of all
packs of all ranks, gradients summed, clipped by their global norm, one AdamW step. Nothing in it waits for the device; loss and
gradient norm are looked at one step later, and before anything is saved.
Everything is a function of (configuration, facts, step): a run that is killed and resumed makes the same numbers as one that isn't.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eagle_kernels import OffloadEngine
from eagle_sampling import Limits
from eagle_train.config import Config
from eagle_train.data.encoding import CachedEncoder
from eagle_train.data.facts import Facts
from eagle_train.data.ledger import Entry, Ledger
from eagle_train.planning.stages import StageSchedule
from eagle_train.watching.metrics import Metrics

from . import checkpoint
from .activations import activation_mode, make_engine
from .batch import Batch, Planned, Share, address_of
from .identity import check_same, identify
from .loader import Loader, Reading, Task, read
from .model import attention_backend, build_model, model_facts, tokenizer_folder
from .optim import learning_rate, make_optimizer, set_trainable
from .parallel import World, is_sharded, shard_model
from .sharing import agree, shares

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run can't go on: the message says at which step, which samples were in it, and what to try."""


@dataclass
class _Pending:
    """A step whose numbers may still be on their way from the device."""

    record: dict[str, Any]
    loss: Tensor
    norm: Tensor
    sample_ids: list[tuple[str, int]]


class Trainer:
    """A run from its configuration: `train()` goes through all stages, from the newest checkpoint if there is one.

    on_record: called on the main rank with every metrics record. on_evaluate: called on every rank with (model, stage name) when an
    evaluation is due; what it returns is written as an "eval" record.
    """

    def __init__(
        self,
        config: Config,
        facts: Facts,
        tokenizer: Any,
        world: World,
        *,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        on_evaluate: Callable[[nn.Module, str], dict[str, Any] | None] | None = None,
    ) -> None:
        self.config, self.facts, self.tokenizer, self.world = config, facts, tokenizer, world
        self.on_record, self.on_evaluate = on_record, on_evaluate
        self.folder: Path = config.run.folder
        self.metrics = Metrics(self.folder / "metrics.jsonl")
        self.ledger = Ledger(self.folder / f"ledger-train{world.rank or ''}.jsonl")
        #: Host memory of `model.activations: offload`, made once and used by every model of the run.
        self.engine: OffloadEngine | None = None
        self.model: nn.Module = self._new_model()
        self.described: Any = self.model.config
        self.schedules = [StageSchedule(facts, config, stage, model_facts(self.described)) for stage in config.stages]
        self.total_steps = sum(schedule.steps for schedule in self.schedules)
        self._data = identify(config, facts, tokenizer, self.schedules)
        self._pending: _Pending | None = None
        self._waiting: dict[str, Any] | None = None
        self._pace: float | None = None
        self._seen = {"tokens": 0, "tiles": 0, "samples": 0, "missing": 0}

    @property
    def missing(self) -> int:
        """Samples that could not be read, so far."""
        return self._seen["missing"]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def train(self) -> None:
        """Train what is left of the run.

        Raises ConfigError when the data changed since the checkpoint, TrainingError for a loss that is not finite, CheckpointError,
        LoaderError.
        """
        stage, step, resumed = self._resume()
        with Loader(
            self._tasks(stage, step),
            self._reading(),
            workers=self.config.loader.workers,
            prefetch=self.config.loader.prefetch,
            encoder=None if self.config.loader.workers else CachedEncoder(self.tokenizer),
        ) as loader:
            for number in range(stage, len(self.schedules)):
                self._train_stage(number, step, loader, resumed if step else None)
                step = 0
        if self.world.is_main:
            for source, seconds in loader.seconds_by_source.most_common(3):
                logger.info("reading of source %s took %.1f s", source, seconds)

    def _resume(self) -> tuple[int, int, Path | None]:
        """Stage and step to go on with, and the checkpoint that they follow, if any; what was written after it is forgotten."""
        path = checkpoint.latest(self.checkpoints)
        progress = checkpoint.read_progress(path) if path is not None else None
        if path is not None and progress is not None:
            check_same(progress.data, self._data, path)
            logger.info("resuming from %s", path)
        if self.world.is_main:
            checkpoint.clean(self.checkpoints)
            self._rewind(progress.total_steps if progress is not None else 0)
        if path is None or progress is None:
            return 0, 0, None
        self._seen = dict(progress.seen)
        lost = self._lost_evaluation(progress)
        if progress.done or lost:  # within a stage weights are read together with the optimizer's state
            checkpoint.read(path, self.model, None, self.world)
        if lost:
            self._evaluate(progress.stage_name, progress.total_steps)
        return (progress.stage + 1, 0, path) if progress.done else (progress.stage, progress.step, path)

    # ---- one stage ---------------------------------------------------------------------------------------------------------------

    def _train_stage(self, number: int, first: int, loader: Loader, resumed: Path | None) -> None:
        stage, schedule = self.config.stages[number], self.schedules[number]
        if is_sharded(self.model) and set(stage.train) != self._sharded_for:
            # FSDP2 remembers at sharding what learns: another choice needs a fresh model, from the end of the last stage.
            self.model = None  # type: ignore[assignment]
            self.model = self._new_model(stage.train)
            checkpoint.read(self.checkpoints / f"{self.config.stages[number - 1].name}-end", self.model, None, self.world)
        set_trainable(self.model, stage.train)
        optimizer = make_optimizer(self.model, stage)
        if resumed is not None:
            checkpoint.read(resumed, self.model, optimizer, self.world)
        self.model.train()
        done_before = sum(schedule.steps for schedule in self.schedules[:number])
        begin, waited = time.monotonic(), loader.waited
        for step in range(first, schedule.steps):
            record = self._step(number, step, optimizer, loader)
            now = time.monotonic()
            elapsed = max(now - begin, 1e-9)
            record |= {
                "seconds": elapsed,
                "tokens_per_second": record["tokens"] / elapsed,
                "tiles_per_second": record["tiles"] / elapsed,
                "data_wait": (loader.waited - waited) / elapsed,
                "total_step": done_before + step + 1,
            }
            begin, waited = now, loader.waited
            self._publish(record, step + 1 == schedule.steps)
            over = step + 1 == schedule.steps
            if over or (step + 1) % self.config.checkpoint.every == 0:
                self._flush()
                seen = dict(self._seen)
                progress = checkpoint.Progress(number, stage.name, step + 1, done_before + step + 1, over, seen, self._data)
                checkpoint.write(self.checkpoints, progress, self.model, None if over else optimizer, self.world)
                if self.world.is_main:
                    checkpoint.keep_newest(self.checkpoints, number, self.config.checkpoint.keep)
            if self._evaluation_is_due(step + 1, over):
                self._flush()
                self._evaluate(stage.name, done_before + step + 1)
                begin = time.monotonic()

    # ---- evaluations -------------------------------------------------------------------------------------------------------------

    def _evaluation_is_due(self, step: int, over: bool) -> bool:
        """Whether one follows `step` steps of a stage, which are all of them when it is `over`."""
        every = self.config.eval.every
        return self.on_evaluate is not None and (over if every is None else step % every == 0)

    def _lost_evaluation(self, progress: checkpoint.Progress) -> bool:
        """Whether the run ended between a checkpoint and the evaluation that follows it; the same on every rank."""
        lost = False
        if self.world.is_main and self._evaluation_is_due(progress.step, progress.done):
            lost = not any(record["kind"] == "eval" and record["total_step"] == progress.total_steps for record in self.metrics)
        return self.world.gather(lost)[0]

    def _evaluate(self, stage: str, total_step: int) -> None:
        assert self.on_evaluate is not None
        self.model.eval()
        result = self.on_evaluate(self.model, stage)
        self.model.train()
        if result is not None and self.world.is_main:
            self._record({"kind": "eval", "stage": stage, "total_step": total_step} | result)

    # ---- one step ----------------------------------------------------------------------------------------------------------------

    def _step(self, number: int, step: int, optimizer: torch.optim.Optimizer, loader: Loader) -> dict[str, Any]:
        stage, schedule, world = self.config.stages[number], self.schedules[number], self.world
        total_step = sum(schedule.steps for schedule in self.schedules[:number]) + step + 1
        micro = stage.packs_per_step // world.data
        batches: list[Batch] = []
        for place in range(micro):
            item = loader.get()
            if item is None or item[0] != (number, step, place):
                raise TrainingError(
                    f"stage {stage.name} step {step}: the loader gave {item and item[0]}, not pack {place}; please report this"
                )
            batches.append(item[1])
        batches, totals = agree(batches, world, partial(self._read_again, number, step))
        lr = learning_rate(step, schedule.steps, stage)
        for group in optimizer.param_groups:
            group["lr"] = lr
        denominator = torch.tensor(max(totals.label_weight, 1e-30), dtype=torch.float32).to(world.device, non_blocking=True)
        loss = torch.zeros((), device=world.device)
        for place, batch in enumerate(batches):
            if is_sharded(self.model):
                self.model.set_requires_gradient_sync(place == micro - 1)  # type: ignore[operator]
            loss += self._forward_backward(batch, denominator)
            if world.context.rank == 0:
                self.ledger.extend(replace(entry, step=total_step) for entry in batch.failed)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        limit = stage.grad_clip if stage.grad_clip is not None else math.inf
        norm = nn.utils.clip_grad_norm_(learning, limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for key in self._seen:
            self._seen[key] += getattr(totals, key)
        record = {
            "kind": "step",
            "stage": stage.name,
            "step": step + 1,
            "steps": schedule.steps,
            "lr": lr,
            "tokens": totals.tokens,
            "tiles": totals.tiles,
            "samples": totals.samples,
            "labels": totals.labels,
            "missing": totals.missing,
            "fill": totals.tokens / (stage.packs_per_step * stage.max_tokens),
            "seen_tokens": self._seen["tokens"],
            "seen_missing": self._seen["missing"],
        }
        ids = [sample for batch in batches for sample in batch.sample_ids]
        self._check()
        self._pending = _Pending(record, loss, norm, ids)
        return record

    def _forward_backward(self, batch: Batch, denominator: Tensor) -> Tensor:
        device = self.world.device
        pin = device.type == "cuda"
        share = shares(batch, self.world, self.described)
        moved = {name: (value.pin_memory() if pin else value).to(device, non_blocking=True) for name, value in share.fields.items()}
        host = {"layout": share.layout, "num_kept": share.num_kept, "tile_plan": share.tile_plan}
        output = self.model(**moved, **host, denominator=denominator)
        output.loss.backward()
        return output.loss.detach()

    # ---- numbers -----------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Look at the last step's loss and gradient norm; they have had a step's time to arrive."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        loss = self.world.sum(pending.loss.double().cpu() if self.world.size > 1 else pending.loss.double()).item()
        norm = float(pending.norm)
        pending.record |= {"loss": loss, "grad_norm": norm}
        if math.isfinite(loss) and math.isfinite(norm):
            return
        ids = sorted({f"{source}:{line}" for some in self.world.gather(pending.sample_ids) for source, line in some})
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        raise TrainingError(
            f"stage {pending.record['stage']} step {pending.record['step']}: loss {loss}, gradient norm {norm}. "
            f"Samples of the step: {shown}. The last checkpoint is from before; lower stages.*.lr, or look at these rows with eagle show"
        )

    def _publish(self, record: dict[str, Any], last: bool) -> None:
        """Records are written one step late, when their loss is there; the last one of a stage at once."""
        waiting, self._waiting = self._waiting, record
        if waiting is not None:
            self._write_step(waiting)
        if last:
            self._flush()

    def _flush(self) -> None:
        self._check()
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._write_step(waiting)

    def _write_step(self, record: dict[str, Any]) -> None:
        if self.world.is_main and (record["step"] % self.config.run.log_every == 0 or record["step"] == record["steps"]):
            self._record(record | {"eta": self._left(record)})

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

    def _rewind(self, total_step: int) -> None:
        """Forget what was written after a step of the run, by however many ranks: it comes again."""
        self.metrics.rewind(total_step)
        for path in self.folder.glob("ledger-train*.jsonl"):
            Ledger(path).rewind(total_step)

    def _record(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        if self.on_record is not None:
            self.on_record(record)

    # ---- what a run is made of ---------------------------------------------------------------------------------------------------

    def _new_model(self, train: Any = None) -> nn.Module:
        model = build_model(self.config, self.tokenizer)
        parts = train or self.config.stages[0].train
        set_trainable(model, parts)
        self._sharded_for = set(parts)
        model.attention_backend = attention_backend(self.config, model.config, self.world.device)
        mode = activation_mode(self.config, self.world.device)
        if mode == "offload" and self.engine is None:
            self.engine = make_engine(self.config, model.config, self.world)
        model.set_activation_checkpointing(mode, self.engine)
        return shard_model(nn.Module.to(model, self.world.device), self.world, self.config.parallel)

    def _reading(self) -> Reading:
        limits = self.config.data.limits
        return Reading(
            str(tokenizer_folder(self.config)),
            model_facts(self.described),
            self.config.tiling.thumbnail,
            Limits(max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, max_frames=limits.max_frames),
            Share(self.world.context.rank, self.world.context.size),
        )

    def _tasks(self, stage: int, step: int) -> Iterator[Task]:
        """This rank's packs from a step on, through all stages."""
        for number in range(stage, len(self.schedules)):
            for current in range(step if number == stage else 0, self.schedules[number].steps):
                yield from self._tasks_of(number, current)

    def _tasks_of(self, number: int, step: int) -> Iterator[Task]:
        """This rank's packs of one step."""
        plan, place_in_epoch = self.schedules[number].locate(step)
        for place, pack in enumerate(plan.packs_of(place_in_epoch, self.world.data_rank, self.world.data)):
            planned = tuple(Planned(address_of(self.facts, sample.row), sample) for sample in plan.samples(pack))
            yield Task((number, step, place), planned, self.config.stages[number].loss_weighting)

    def _read_again(self, number: int, step: int, place: int, missing: dict[int, Entry]) -> Batch:
        """A pack without some samples, here and now: rare, and the loader's processes are already ahead."""
        task = next(itertools.islice(self._tasks_of(number, step), place, None))
        return read(task, CachedEncoder(self.tokenizer), self._reading(), missing)
