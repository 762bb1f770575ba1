"""Teacher-forced scoring: rows as in training, in packs, through one forward each. Nothing is generated and no cache is kept.

Packs may be shared by context parallel ranks, as in training, so rows of 128K tokens and more are scored. The results of a row do not
depend on the rows that it is packed with, nor on the number of ranks, except for rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from eagle_model.prompt import IGNORE_INDEX, CachedEncoder
from eagle_model.visual import VisualPlans, VisualSpec
from eagle_train.config import Config
from eagle_train.data.facts import Facts
from eagle_train.data.ledger import Entry
from eagle_train.data.measure import media_limits
from eagle_train.data.sample import Sample
from eagle_train.distributed.agreement import agree
from eagle_train.distributed.sharding import is_sharded
from eagle_train.distributed.world import World
from eagle_train.errors import EvaluationError, describe
from eagle_train.loading.pack import LoadedPack, Share, load_pack
from eagle_train.planning.packing import pack
from eagle_train.planning.stages import Planned
from eagle_train.planning.visual import sample_plan

logger = logging.getLogger(__name__)


class Variant(NamedTuple):
    """A row with another last answer (None: as it is)."""

    row: int
    answer: str | None = None


class TurnScore(NamedTuple):
    """An assistant turn. loss: sum of its tokens' negative log-likelihood in nats. tokens: of the turn, with `<|im_end|>`. right: how many
    of them are the most likely token."""

    loss: float
    tokens: int
    right: int


Scores = dict[Variant, tuple[TurnScore, ...]]
"""Of every variant that could be read, its assistant turns in order (those that have labels)."""


def score_variants(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    plans: VisualPlans,
    variants: Sequence[Variant],
    config: Config,
    world: World,
    spec: VisualSpec,
    *,
    capacity: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Scores:
    """Score the assistant turns of `variants`; a collective of all ranks, which all get every result.

    capacity: longest pack in tokens, unless a sample is longer. Rows that a plan dropped, or that cannot be read, are missing from the
    result. Raises EvaluationError on every rank when one fails, and RankError as `evaluate` does.
    """
    encoder = CachedEncoder(tokenizer)
    planned = [_planned(facts, plans, variant, spec, encoder) for variant in variants if plans.status[variant.row] == 0]
    kept = [variant for variant in variants if plans.status[variant.row] == 0]
    packs = _packs([one.plan.tokens for one in planned], capacity)
    mine = packs[world.data_rank :: world.data]
    rounds = -(-len(packs) // world.data)
    share = Share(world.context.rank, world.context.size)
    limits = media_limits(config.data.limits)

    def load(places: Sequence[int], skip: dict[int, Entry] | None = None) -> LoadedPack:
        return load_pack(
            [planned[place] for place in places],
            encoder,
            spec,
            weighting="token",
            limits=limits,
            share=share,
            skip=skip,
            change=lambda number, sample: _with_answer(sample, kept[places[number]].answer),
        )

    failure: str | None = None
    own: dict[int, np.ndarray] = {}
    for number in range(rounds):
        places = mine[number] if number < len(mine) else []
        try:
            loaded = load(places)
        except Exception as error:
            failure, places = failure or describe(error), []
            loaded = load(places)
        again = partial(_again, load, places)
        [loaded], _ = agree([loaded], world, again)
        for entry in loaded.concealed:
            logger.warning("%s:%d: %s", entry.source, entry.line, entry.detail)
        try:
            scores = _score_pack(model, loaded, world)
        except Exception as error:
            failure = failure or describe(error)
            if is_sharded(model) or world.context.size > 1:
                break
            scores = []
        read = [place for index, place in enumerate(places) if index not in loaded.missing]
        own.update(zip(read, scores))
        if progress is not None:
            progress(sum(map(len, mine[: number + 1])), sum(map(len, mine)), "scored")
    if failures := world.failures(failure):
        raise EvaluationError("; ".join(failures))
    merged: dict[int, np.ndarray] = {}
    for part in world.gather(own):
        for place, turns in part.items():
            merged[place] = merged[place] + turns if place in merged else turns
    return {
        kept[place]: tuple(TurnScore(float(loss), int(tokens), int(right)) for loss, tokens, right in turns)
        for place, turns in sorted(merged.items())
    }


def _again(load: Callable[..., LoadedPack], places: Sequence[int], _: int, missing: dict[int, Entry]) -> LoadedPack:
    return load(places, missing)


def _planned(facts: Facts, plans: VisualPlans, variant: Variant, spec: VisualSpec, encoder: CachedEncoder) -> Planned:
    """The row at the address with its plan; another answer may be longer than the planned one by its own tokens."""
    plan = sample_plan(facts, plans, variant.row, spec)
    if variant.answer is not None:
        plan = replace(plan, tokens=plan.tokens + len(encoder.pieces([variant.answer])[0]))
    return Planned(facts.address(variant.row), plan)


def _packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of the samples of each pack, in an order that depends on the lengths only."""
    if not lengths:
        return []
    made = pack(np.array(lengths), max(capacity, max(lengths)))
    return [made.items[start:stop].tolist() for start, stop in zip(made.offsets[:-1], made.offsets[1:])]


def _with_answer(sample: Sample, answer: str | None) -> Sample:
    """The sample up to its last learned answer, which becomes `answer`."""
    if answer is None:
        return sample
    last = last_answer(sample.messages)
    return replace(sample, messages=[*sample.messages[:last], {**sample.messages[last], "content": answer}])


def last_answer(messages: Sequence[Mapping[str, Any]]) -> int:
    """Index of the last assistant turn that is learned. Raises ValueError when there is none."""
    return max(index for index, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True))


def _score_pack(model: nn.Module, loaded: LoadedPack, world: World) -> list[np.ndarray]:
    """This rank's part of the sums of every sample of the pack: float64 [turns, 3] of loss, tokens, right tokens."""
    batch, described = loaded.batch, model.config
    targets = np.asarray(batch.targets)
    labelled = targets != IGNORE_INDEX
    starts = labelled & ~np.concatenate([[False], labelled[:-1]])
    turns = np.where(labelled, np.cumsum(starts) - 1, -1)
    layout = world.layout(batch.cu_seqlens, described.text_config, batch.prefixes)  # type: ignore[union-attr]
    with torch.no_grad():
        part = batch.shard(layout, described.tokens_per_tile).to(world.device)  # type: ignore[union-attr, arg-type]
        output = model(part, layout=layout, score_tokens=True)
    losses, right = output.token_losses.double().cpu().numpy(), output.token_right.cpu().numpy()
    own = layout.shard(torch.from_numpy(turns), fill=-1).numpy()
    sums = np.zeros((int(starts.sum()), 3))
    rows = own >= 0
    for column, values in enumerate((losses, np.ones(len(own)), right.astype(np.float64))):
        sums[:, column] = np.bincount(own[rows], values[rows], minlength=len(sums))
    first = np.concatenate([[0], np.cumsum(starts)])
    return [sums[first[begin] : first[end]] for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:])] if loaded.sample_ids else []
