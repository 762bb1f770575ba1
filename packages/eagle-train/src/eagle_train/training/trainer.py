"""The loop: stages in order, each step a number of packs over all ranks, every label counted once, on whichever rank it is read.

One optimizer step of a rank: its packs of the step one after the other (accumulation), each loss divided by the label weights of all
packs of all ranks, gradients summed, clipped by their global norm, one optimizer step. The host waits for the device once a step, when
all work of the step is queued: it then reads the loss and gradient norm of the step before. It also does so before anything is saved.
Everything is a function of (configuration, facts, step): a run that is killed and resumed gives the same numbers as one that is not.
"""

from __future__ import annotations

import gc
import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from eagle_cp.watchdog import Watchdog
from eagle_kernels import OffloadEngine
from eagle_model.prompt import CachedEncoder
from eagle_train.config import Config, ConfigError, StageConfig
from eagle_train.data.ledger import Entry, Ledger
from eagle_train.data.measure import media_limits
from eagle_train.distributed.agreement import Totals, agree
from eagle_train.distributed.sharding import is_sharded, replicas_of, shard_model
from eagle_train.distributed.world import World
from eagle_train.loading.loader import Loader, Reading, read
from eagle_train.loading.pack import LoadedPack, Share
from eagle_train.loading.tasks import Tasks
from eagle_train.planning.identity import check_same, identify
from eagle_train.planning.stages import StageSchedule, check_groups

from . import checkpoint, heartbeat
from .activations import activation_mode, make_engine
from .build import empty_model, fill_model, use_fp8
from .ema import MovingAverage
from .evaluations import Evaluations
from .gradients import Gradients
from .heartbeat import Heartbeat
from .memory import check_host_memory, check_memory, explained, usage
from .model import attention_backend, model_config, tokenizer_folder
from .optim import check_optimizers, make_optimizer, set_learning_rates, set_trainable
from .records import Pending, Records, TrainingError
from .saving import Saver
from .selection import Selection, Selector
from .source_losses import SourceLosses
from .startup import StartUp
from .stop import Interrupted, StopSignals, what_is_saved
from .warmup import Warmup

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a run: `train()` goes through all stages, from the newest checkpoint if there is one.

    on_record: called on the main rank with every metrics record. on_evaluate: called on every rank with (model, steps of the run) when
    an evaluation is due; what it returns is written as an "eval" record. When it fails on any rank, an "eval_failed" record is written,
    `failed_evaluations` gets an entry on every rank, and training continues. stop: signals that are handled (default: none). on_slow:
    called on the main rank with a line about a step that takes longer than a minute (default: it is logged). startup: phases before
    this; those until the first step follow.
    """

    def __init__(
        self,
        config: Config,
        schedules: Sequence[StageSchedule],
        tokenizer: Any,
        world: World,
        *,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        on_evaluate: Callable[[nn.Module, int], dict[str, Any]] | None = None,
        stop: StopSignals | None = None,
        on_slow: Callable[[str], None] | None = None,
        startup: StartUp | None = None,
    ) -> None:
        self.config, self.tokenizer, self.world = config, tokenizer, world
        #: The plan of every stage, made before the model.
        self.schedules = list(schedules)
        self.total_steps = sum(schedule.steps for schedule in self.schedules)
        self.tasks = Tasks(self.schedules, world.data_rank, world.data)
        self._data = identify(config, tokenizer, self.schedules)
        self.stop = stop or StopSignals()
        self.beat = Heartbeat(on_slow or logger.info, store=world.store, rank=world.rank, size=world.size)
        #: Called after every step, for example by a profile.
        self.after_step: Callable[[], None] = lambda: None
        self.folder: Path = config.run.folder
        self.startup = startup or StartUp()
        self.records = Records(config, self.schedules, world, on_record, self.startup)
        self.evaluations = Evaluations(config, world, self.records, self.total_steps, on_evaluate)
        self.ledger = Ledger(self.folder / f"ledger-train{world.rank or ''}.jsonl")
        check_optimizers(config.stages)
        for stage in config.stages:
            try:
                check_groups(stage, world.data)
            except ConfigError as error:
                raise ConfigError(f"{error}, or train on fewer processes (--nproc)") from error
        if world.device.type == "cuda":
            check_memory(config, model_config(config, tokenizer), world)
        mode = activation_mode(config, world.device)
        #: What `selective` keeps and `offload` computes again, chosen for every stage; None with other values of `model.activations`.
        self._selector = Selector(config, world, usage) if mode in ("selective", "offload") else None
        self.selection: Selection | None = None
        #: Host memory of `offload`, made by the first stage with it for all of them.
        self.engine: OffloadEngine | None = None
        #: Its processes start, and read the first packs, while the model is made and filled.
        self._loader = self._start_reading()
        self._warmup = Warmup(config, model_config(config, tokenizer), world.device) if world.device.type == "cuda" else None
        try:
            self.model: nn.Module = self._new_model(weights=checkpoint.latest(self.checkpoints) is None)
        except BaseException:
            self._loader.close()
            raise
        #: The moving average of the trained weights, with `model.ema`.
        self.average = MovingAverage(self.model, config, config.model.ema) if config.model.ema is not None else None
        self._seen = {"tokens": 0, "tiles": 0, "samples": 0, "missing": 0, "concealed": 0}
        #: Stage and step of the newest checkpoint, and when it was written.
        self._saved, self._saved_at = (0, 0), time.monotonic()
        self.saver = Saver(self.checkpoints, world, keep=config.checkpoint.keep, background=config.checkpoint.background)
        self.startup.over("model")

    @property
    def missing(self) -> int:
        """Samples that could not be read, so far."""
        return self._seen["missing"]

    @property
    def concealed(self) -> int:
        """Damaged frames that were trained as the decoder makes them (`on_damage: conceal`), so far."""
        return self._seen["concealed"]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def train(self) -> None:
        """Train what is left of the run.

        Raises ConfigError when the data changed since the checkpoint, TrainingError for a loss that is not finite, CheckpointError,
        LoaderError, and Interrupted on every rank when a signal asked one of them to stop; by then a checkpoint is written.
        """
        try:
            with self.stop.deferred(), self.beat, self._collective_watch():
                self._train()
                self.check_stop()
        except Interrupted as stop:
            raise Interrupted(stop.signum, f"stopped; {self.what_is_saved()}") from None
        finally:
            self.saver.close()

    def _collective_watch(self) -> Any:
        """Names the collective of a context group that a rank waits in, after a minute."""
        meshes = [self.world.context, *self.world.splits.values()]
        if self.world.context.size == 1:
            return nullcontext()
        groups = {id(group): group for mesh in meshes for group in mesh.groups()}
        report = logger.warning if self.world.context.rank == 0 else lambda _: None
        return Watchdog(list(groups.values()), heartbeat.EVERY, self.world.store, report)

    def what_is_saved(self) -> str:
        """What a command that trains this run continues from."""
        return what_is_saved(self.folder, self.config.stages[-1].name, began=self.stop.training)

    def check_stop(self) -> None:
        """Raises Interrupted on every rank when a signal asked one of them to stop; a collective of all ranks, for use between steps."""
        signum = max(self.world.gather(self.stop.requested))
        if signum:
            raise Interrupted(signum)

    def _train(self) -> None:
        with self._loader as loader:
            stage, step, resumed = self._resume()
            self._saved = stage, step
            for number in range(stage, len(self.schedules)):
                self._train_stage(number, step, loader, resumed if step else None)
                step = 0
            self.saver.wait()
        if self.world.is_main:
            if splits := self.world.chosen:
                logger.info("context parallel splits: %s", ", ".join(f"{name} {count} packs" for name, count in splits.most_common()))
            longest = loader.seconds_by_source.most_common(3)
            if longest and longest[0][1] >= 1:
                readers = self.config.loader.workers
                who = f"{readers} reading processes of this rank, next to training" if readers else "this process, between steps"
                logger.info("time spent on reading by %s: %s", who, ", ".join(f"{name} {seconds:.0f} s" for name, seconds in longest))

    def _resume(self) -> tuple[int, int, Path | None]:
        """Stage and step to go on with, and the checkpoint that they follow, if any; what was written after it is forgotten."""
        path = checkpoint.latest(self.checkpoints)
        progress = checkpoint.read_progress(path) if path is not None else None
        if path is not None and progress is not None:
            open_stages = [stage.name for stage in self.config.stages[progress.stage + progress.done :]]
            check_same(progress.data, self._data, path, open_stages=open_stages)
            if self.world.is_main:
                logger.info("resuming from %s", path)
        if self.world.is_main:
            checkpoint.clean(self.checkpoints)
            self.records.rewind(progress.total_steps if progress is not None else 0)
        if path is None or progress is None:
            return 0, 0, None
        self._seen |= progress.seen
        lost = self.evaluations.lost(progress)
        if progress.done or lost:  # within a stage weights are read together with the optimizer's state
            self._load(path, None)
        if lost:
            self._evaluate(progress.stage_name, progress.total_steps)
        return *_next_step(progress), path

    # ---- one stage ---------------------------------------------------------------------------------------------------------------

    def _train_stage(self, number: int, first: int, loader: Loader, resumed: Path | None) -> None:
        stage, schedule = self.config.stages[number], self.schedules[number]
        if is_sharded(self.model) and stage.modes != self._sharded_for:
            # FSDP2 remembers at sharding what is trained: another choice needs a new model, from the end of the last stage.
            self.saver.wait()
            self.model = None  # type: ignore[assignment]
            gc.collect()  # FSDP2's modules refer to each other in circles; the next model needs the GPU memory of this one
            self.model = self._new_model(stage.modes, weights=False)
            checkpoint.read(self.checkpoints / f"{self.config.stages[number - 1].name}-end", self.model, None, self.world)
        set_trainable(self.model, stage.modes)
        self._select(stage)
        optimizer = make_optimizer(self.model, stage)
        if resumed is not None:
            self._load(resumed, optimizer)
        elif stage.carry_optimizer:
            self.saver.wait()
            checkpoint.carry_optimizer(self.checkpoints / f"{self.config.stages[number - 1].name}-end", self.model, optimizer, self.world)
        # Once the optimizer has its state: torch makes it by a step with gradients of zeros in the weights' dtype.
        replicas = replicas_of(self.config.parallel, self.world.size)
        self._gradients = Gradients(self.model, stage.packs_per_step // self.world.data, replicas)
        self.model.train()
        done_before = sum(schedule.steps for schedule in self.schedules[:number])
        begin, waited = time.monotonic(), loader.waited
        for step in range(first, schedule.steps):
            if self.stop.requested and self.world.size == 1:  # without waiting for the next packs
                self._save_and_stop(number, step, optimizer, self.stop.requested)
            self.beat.begin(f"step {step + 1} of stage {stage.name}")
            packs, totals = self._read(number, step, loader)
            if totals.interrupts or totals.terminations:
                self._save_and_stop(number, step, optimizer, signal.SIGTERM if totals.terminations else signal.SIGINT)
            if totals.broken:  # a checkpoint could not be written: every rank knows at the same step
                self.saver.wait()
            self._compiled()
            pending = self._step(number, step, optimizer, packs, totals)
            self.stop.training = True
            if self.records.starting and self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)  # later steps are waited for when the next one is queued
            now = time.monotonic()
            elapsed = max(now - begin, 1e-9)
            speed: dict[str, Any] = {
                "seconds": elapsed,
                "tokens_per_second": totals.tokens / elapsed,
                "tiles_per_second": totals.tiles / elapsed,
                "data_wait": (loader.waited - waited) / elapsed,
                **self.records.use(pending.record["flops"] / elapsed / self.world.size),
                "total_step": done_before + step + 1,
            }
            if self.selection is not None:
                speed["memory_planned"] = self.selection.plan.gpu
            begin, waited = now, loader.waited
            self.records.hold(pending, speed)
            over = step + 1 == schedule.steps
            self.after_step()
            if over or self.records.starting:
                self.records.settle()
            if over or totals.saves or (step + 1) % self.config.checkpoint.every == 0:
                self._save(number, step + 1, optimizer)
            if self.evaluations.due(step + 1, over):
                self.records.settle()
                try:
                    self._evaluate(stage.name, done_before + step + 1)
                except Interrupted as stop:  # the same command repeats the evaluation
                    self._save_and_stop(number, step + 1, optimizer, stop.signum)
                begin = time.monotonic()
        self._gradients.close()

    def _compiled(self) -> None:
        """Returns when kernels are compiled."""
        if self._warmup is not None:
            self.startup.over("first packs")
            self.beat.at("the compilation of kernels")
            self._warmup.wait()
            self._warmup = None
            self.startup.over("kernels")

    def _select(self, stage: StageConfig) -> None:
        """Choose what backward finds of the activations of a stage."""
        if self._selector is None:
            return
        model: Any = self.model
        self.selection = chosen = self._selector.select(stage, model.config)
        if chosen.offload and self.engine is None:
            later = self.config.stages[self.config.stages.index(stage) :]
            longest = [one for one in later if one is stage or self._selector.select(one, model.config).offload]
            self.engine = make_engine(self.config.replaced(stages=longest), model.config, self.world)
        model.set_activation_checkpointing(chosen.mode, self.engine, **chosen.options)
        if self.world.is_main:
            logger.info("stage %s: %s", stage.name, chosen.text)

    # ---- checkpoints -------------------------------------------------------------------------------------------------------------

    def _save(self, number: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint after `step` steps of a stage, while training goes on."""
        self.beat.at("the copy of a checkpoint, or the end of writing the one before")
        self.records.settle()
        schedules, name = self.schedules, self.config.stages[number].name
        over, total = step == schedules[number].steps, sum(schedule.steps for schedule in schedules[:number]) + step
        progress = checkpoint.Progress(number, name, step, total, over, dict(self._seen), self._data)
        carried = number + 1 < len(schedules) and self.config.stages[number + 1].carry_optimizer
        average = self.average.tensors if self.average is not None else None
        self.saver.save(progress, self.model, optimizer if carried or not over else None, average=average)
        self._saved, self._saved_at = (number, step), time.monotonic()

    def _load(self, path: Path, optimizer: torch.optim.Optimizer | None) -> None:
        """The state of a checkpoint, with the moving average."""
        average = self.average.tensors if self.average is not None else None
        checkpoint.read(path, self.model, optimizer, self.world, average=average)

    def _save_is_due(self) -> bool:
        """Whether `checkpoint.minutes` have passed, by the main rank's clock."""
        minutes = self.config.checkpoint.minutes
        return self.world.is_main and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def _save_and_stop(self, number: int, step: int, optimizer: torch.optim.Optimizer, signum: int) -> NoReturn:
        """Raises Interrupted, with a checkpoint after `step` steps of a stage; every rank calls it at the same step."""
        self.records.settle()
        if step and self._saved != (number, step):
            self._save(number, step, optimizer)
        self.saver.wait()
        raise Interrupted(signum)

    def _evaluate(self, stage: str, total_step: int) -> None:
        self.beat.begin(f"evaluation after step {total_step}")
        self.evaluations.run(self.model, stage, total_step)

    # ---- one step ----------------------------------------------------------------------------------------------------------------

    def _read(self, number: int, step: int, loader: Loader) -> tuple[list[LoadedPack], Totals]:
        """This rank's packs of a step, and the sums over all ranks."""
        stage, requested = self.config.stages[number], self.stop.requested
        micro = stage.packs_per_step // self.world.data
        packs: list[LoadedPack] = []
        for place in range(micro):
            self.beat.at(f"reading of pack {place + 1} of {micro}")
            item = loader.get()
            if item is None or item[0] != (number, step, place):
                raise TrainingError(
                    f"stage {stage.name} step {step}: the loader gave {item and item[0]}, not pack {place}; please report this"
                )
            packs.append(item[1])
        self.beat.at("the sums over all ranks (all-reduce)")
        requests = (requested == signal.SIGINT, requested == signal.SIGTERM, self._save_is_due(), self.saver.broken)
        return agree(packs, self.world, partial(self._read_again, number, step), requests)

    def _step(self, number: int, step: int, optimizer: torch.optim.Optimizer, packs: list[LoadedPack], totals: Totals) -> Pending:
        stage, schedule, world = self.config.stages[number], self.schedules[number], self.world
        total_step = sum(schedule.steps for schedule in self.schedules[:number]) + step + 1
        micro = len(packs)
        lr = set_learning_rates(optimizer, step, schedule.steps, stage)
        denominator = torch.tensor(max(totals.label_weight, 1e-30), dtype=torch.float32).to(world.device, non_blocking=True)
        loss = torch.zeros((), device=world.device)
        sources = SourceLosses([source.name for source in schedule.facts.sources], world.device)
        for place, pack in enumerate(packs):
            self._gradients.begin(place)
            doing = f"forward/backward of pack {place + 1} of {micro}"
            self.beat.at(doing)
            with explained(
                self.config, self.model.config, world, stage=stage, step=step + 1, doing=doing, pack=pack, selection=self.selection
            ):
                loss += self._forward_backward(replace(pack, batch=replace(pack.batch, denominator=denominator)), sources)
            if world.context.rank == 0:
                self.ledger.extend(replace(entry, step=total_step) for entry in pack.failed)
            self.ledger.extend(replace(entry, step=total_step) for entry in pack.concealed)
        self.beat.at("the optimizer")
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        limit = stage.grad_clip if stage.grad_clip is not None else math.inf
        norm = nn.utils.clip_grad_norm_(learning, limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]
        doing = "the optimizer's step"
        with explained(self.config, self.model.config, world, stage=stage, step=step + 1, doing=doing, selection=self.selection):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        for key in self._seen:
            self._seen[key] += getattr(totals, key)
        plan, place = schedule.locate(step)
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
            "concealed": totals.concealed,
            "fill": totals.tokens / (stage.packs_per_step * stage.max_tokens),
            "flops": plan.step_flops(place),
            "seen_tokens": self._seen["tokens"],
            "seen_missing": self._seen["missing"],
            "seen_concealed": self._seen["concealed"],
        }
        ids = [sample for pack in packs for sample in pack.sample_ids]
        self.records.settle()
        return Pending(record, loss, norm, sources, ids)

    def _forward_backward(self, pack: LoadedPack, sources: SourceLosses) -> Tensor:
        """Loss of a pack (of this context parallel rank's part of it), with its gradients, and its tokens' losses in `sources`, added."""
        described: Any = self.model.config
        layout = self.world.layout(pack.batch.cu_seqlens, described.text_config, pack.batch.prefixes)
        part = pack.batch.shard(layout, described.tokens_per_tile).to(self.world.device)
        output = self.model(part, layout=layout, token_losses=True)
        output.loss.backward()
        sources.add(pack, layout, output.token_losses, part.token_weights, count=self.world.context.rank == 0)
        return output.loss.detach()

    # ---- model and reading --------------------------------------------------------------------------------------------------------

    def _new_model(self, modes: Any = None, *, weights: bool = True) -> nn.Module:
        """weights: False leaves weights undefined, where a checkpoint of the run follows."""
        empty = empty_model(self.config, self.tokenizer, weights=weights)
        modes, model = modes or self.config.stages[0].modes, empty.model
        use_fp8(self.config, model)
        if self.config.model.weights == "bfloat16":
            if self.config.parallel.dtype != "bfloat16":
                raise ConfigError(
                    f"model.weights is bfloat16 and the run computes in {self.config.parallel.dtype}: set parallel.dtype: bfloat16"
                )
            nn.Module.to(model, torch.bfloat16)
        trained = set_trainable(model, modes)
        if self.world.device.type == "cuda":
            total = sum(parameter.numel() for parameter in model.parameters())
            check_host_memory(self.config, trained, total, self.world)
        self._sharded_for = modes
        model.attention_backend = attention_backend(self.config, model.config, self.world.device)
        if self._selector is None:
            model.set_activation_checkpointing(activation_mode(self.config, self.world.device))
        sharded = shard_model(model, self.world, self.config.parallel)
        fill_model(sharded, empty.rows, self.world)
        return sharded

    def _start_reading(self) -> Loader:
        """The loader, at the step that follows the newest checkpoint."""
        newest = checkpoint.latest(self.checkpoints)
        stage, step = _next_step(checkpoint.read_progress(newest)) if newest is not None else (0, 0)
        loader = self.config.loader
        encoder = None if loader.workers else CachedEncoder(self.tokenizer)
        tasks = self.tasks.from_step(stage, step)
        return Loader(tasks, self._reading(), workers=loader.workers, prefetch=loader.prefetch, encoder=encoder)

    def _reading(self) -> Reading:
        share = Share(self.world.context.rank, self.world.context.size)
        origin = self.folder / "origin"  # with Eagle's tokens, also where the language model's own tokenizer lacks them
        tokenizer = origin if (origin / "tokenizer_config.json").is_file() else tokenizer_folder(self.config)
        return Reading(str(tokenizer), self.schedules[0].spec, media_limits(self.config.data.limits), share, self.config.data.remote)

    def _read_again(self, number: int, step: int, place: int, missing: dict[int, Entry]) -> LoadedPack:
        """A pack without some samples, read in this process: rare, and the loader's processes are already ahead."""
        return read(self.tasks.one(number, step, place), CachedEncoder(self.tokenizer), self._reading(), missing)


def _next_step(progress: checkpoint.Progress) -> tuple[int, int]:
    """Stage and step to go on with after a checkpoint."""
    return (progress.stage + 1, 0) if progress.done else (progress.stage, progress.step)
