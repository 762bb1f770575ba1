"""A row or pack as the model gets it: the views of `eagle show`. No model is made."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from eagle_train.config import Config, ConfigError
from eagle_train.data.facts import Facts
from eagle_train.data.ledger import read_entries
from eagle_train.data.measure import media_limits
from eagle_train.data.prepare import load_facts
from eagle_train.data.sample import load_sample
from eagle_train.planning.stages import Planned, StageSchedule, follows
from eagle_train.planning.visual import plan_visual, sample_plan, visual_spec
from eagle_train.training.model import load_run_tokenizer
from eagle_train.training.sizes import model_sizes, stage_costs

from .show import SampleView, view_sample


class View(NamedTuple):
    """The samples of a pack, or one row (capacity None)."""

    views: list[SampleView]
    title: str
    capacity: int | None


def view(config: Config, *, row: str | None, stage: str | None, pack: int, evaluation: bool) -> View:
    """One row (`source:line`), or a pack of a stage's first epoch. Raises ConfigError for a name or number that isn't there."""
    tokenizer = load_run_tokenizer(config)
    facts = load_facts(config, tokenizer, evaluation=evaluation)
    names = [one.name for one in config.stages]
    if stage is not None and stage not in names:
        raise ConfigError(f"no stage is called {stage!r}; they are {', '.join(names)}")
    chosen = config.stages[names.index(stage) if stage is not None else (-1 if evaluation else 0)]
    sizes = model_sizes(config, tokenizer)
    spec = visual_spec(config, sizes)
    if row is None and evaluation:
        raise ConfigError("held-out rows aren't packed; name one with --row source:line")
    if row is None:
        plan = StageSchedule(facts, config, chosen, spec, costs=stage_costs(config, chosen, sizes, tokenizer)).plan(0)
        if not 0 <= pack < plan.packs:
            raise ConfigError(f"stage {chosen.name} has packs 0 ... {plan.packs - 1}, there is no {pack}")
        plans, title, capacity = plan.samples(pack), f"stage {chosen.name}, pack {pack} of {plan.packs}", chosen.max_tokens
    else:
        try:
            number = find_row(facts, row)
        except ConfigError as error:
            raise _with_reason(error, config, row, "prepare eval" if evaluation else "prepare") from error
        share_media = config.packing.share_media and not evaluation
        visual = plan_visual(facts, chosen.max_tokens, spec, share_media=share_media, reserve=config.packing.reserve)
        plans = [Planned(facts.address(number), sample_plan(facts, visual, number, spec))]
        title, capacity = f"{row} in stage {chosen.name}", None
    limits = media_limits(config.data.limits)
    views = [view_sample(load_sample(one.address), one.plan, spec, tokenizer, budget=chosen.max_tokens, limits=limits) for one in plans]
    shared = [one.media_tokens if follows(plans, place) else 0 for place, one in enumerate(plans)]
    return View([replace(one, shared=tokens) for one, tokens in zip(views, shared)], title, capacity)


def _with_reason(error: ConfigError, config: Config, row: str, where: str) -> ConfigError:
    """The error with the reason that the ledger has for the row, if it has one."""
    ledger = config.run.folder / "ledger.jsonl"
    for entry in read_entries(ledger) if ledger.is_file() else ():
        if f"{entry.source}:{entry.line}" == row and entry.where == where:
            return ConfigError(f"{row} can't be used: {entry.reason}: {entry.detail}")
    return error


def find_row(facts: Facts, name: str) -> int:
    """The row `source:line`; raises ConfigError when there is none (it may be in the ledger)."""
    source_name, _, line = name.rpartition(":")
    for source in facts.sources:
        if source.name == source_name and line.isdigit():
            lines = facts.column("line")[source.first : source.first + source.rows]
            found = (lines == int(line)).nonzero()[0]
            if len(found):
                return source.first + int(found[0])
            raise ConfigError(f"source {source_name} has no usable row in line {line}; if the line exists, the reason is in the ledger")
    raise ConfigError(f"{name!r}: expected source:line with a source of {', '.join(source.name for source in facts.sources)}")
