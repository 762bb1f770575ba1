"""A run that is prepared and planned: what training, evaluation and the verbs start from."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from eagle_model.visual import VisualSpec
from eagle_train.config import Config
from eagle_train.data.facts import Facts
from eagle_train.data.ledger import Ledger
from eagle_train.data.lock import waited_for
from eagle_train.data.prepare import PrepareError, Progress, load_facts, prepare
from eagle_train.planning.stages import StageSchedule
from eagle_train.planning.visual import visual_spec
from eagle_train.training.model import load_run_tokenizer
from eagle_train.training.sizes import model_sizes, stage_costs

if TYPE_CHECKING:  # planning needs no torch
    from eagle_train.distributed.world import World


@dataclass(frozen=True)
class Ready:
    """A run that is prepared: sizes of its model (`ModelSizes` or `EagleConfig`), facts of its rows, and of the held-out ones (None when
    there are none)."""

    config: Config
    tokenizer: Any
    sizes: Any
    facts: Facts
    eval_facts: Facts | None

    @cached_property
    def spec(self) -> VisualSpec:
        """How media become tiles in this run."""
        return visual_spec(self.config, self.sizes)

    @cached_property
    def schedules(self) -> list[StageSchedule]:
        """The plan of every stage, made by one process of each host; no model is made for it.

        Raises ValueError for a stage without a row that fits.
        """
        folder = self.config.facts_folder / "plans"
        costs = [stage_costs(self.config, stage, self.sizes, self.tokenizer) for stage in self.config.stages]
        return [
            StageSchedule(self.facts, self.config, stage, self.spec, folder=folder, costs=cost)
            for stage, cost in zip(self.config.stages, costs)
        ]

    def record_drops(self) -> None:
        """Write the rows that a stage can't fit to the run's ledger, in place of what the stage wrote before."""
        ledger = Ledger(self.config.run.folder / "ledger.jsonl")
        for schedule in self.schedules:
            ledger.replace(schedule.plan(0).drops(), where=f"stage {schedule.stage.name}")


def has_evaluation(config: Config) -> bool:
    """Whether held-out sources are configured."""
    return config.data.eval_recipe is not None or bool(config.data.eval_sources)


def get_ready(
    config: Config, world: World | None = None, progress: Callable[[Progress], None] | None = None, *, held_out: bool = True
) -> Ready:
    """Load the tokenizer and prepare all sources; with several ranks the main rank prepares and the others map what it made.

    A rank that finds nothing is on a host with a disk of its own: the first such rank of the host prepares there, too.
    held_out: False skips the held-out sources. Raises ConfigError for a model that can't be built, and PrepareError on every
    rank when hosts measured different facts.
    """
    tokenizer = load_run_tokenizer(config)
    # Before rows are measured, which can take hours: a model that can't be built is refused here.
    sizes = model_sizes(config, tokenizer)

    def ready(load: Callable[..., Facts]) -> Ready:
        facts = load(config, tokenizer)
        held = load(config, tokenizer, evaluation=True) if held_out and has_evaluation(config) else None
        return Ready(config, tokenizer, sizes, facts, held)

    def measured(*given: Any, **options: Any) -> Facts:
        return prepare(*given, progress=progress, **options).facts

    def found(*given: Any, **options: Any) -> Facts:
        try:
            return load_facts(*given, **options)
        except PrepareError:
            config.facts_folder.mkdir(parents=True, exist_ok=True)
            with waited_for(config.facts_folder / ".ranks.lock"):
                return prepare(*given, **options).facts

    if world is None:
        return ready(measured)
    result = world.first(lambda: ready(measured)) or ready(found)
    _check_agreement(result, world)
    return result


class DifferentFactsError(PrepareError):
    """Hosts can't train one run on different facts: their plans would have different packs."""

    on_every_rank = True


def _check_agreement(ready: Ready, world: World) -> None:
    """Raises DifferentFactsError on every rank unless all have the same facts. A collective of all ranks."""
    own = tuple(facts.content for facts in (ready.facts, ready.eval_facts) if facts is not None)
    hosts: dict[tuple[str, ...], set[str]] = {}
    for content, host in world.gather((own, socket.gethostname()), patient=True):
        hosts.setdefault(content, set()).add(host)
    if len(hosts) > 1:
        groups = "; ".join(", ".join(sorted(names)) for names in hosts.values())
        raise DifferentFactsError(
            f"ranks measured different facts under {ready.config.facts_folder} (hosts that agree: {groups}): their rows or media differ, "
            "or some are missing; compare the ledgers, copy rows and media again, or share one disk"
        )
