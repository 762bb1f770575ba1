"""What the sources of a run hold: rows, hours, tokens, lengths before and after ADS, duplicates, and why rows are not used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from jinja2 import Environment

from eagle_model.visual import VisualSpec
from eagle_model.visual.plan import NO_LIMIT
from eagle_train.config import Config, StageConfig
from eagle_train.data.errors import RowError
from eagle_train.data.facts import Facts, FactsSource
from eagle_train.data.ledger import Ledger, top_reasons
from eagle_train.data.prepare import load_facts
from eagle_train.data.sample import load_sample
from eagle_train.planning.draws import choose_rows
from eagle_train.planning.mixture import SourceDraws, count_draws
from eagle_train.planning.visual import plan_visual, visual_spec
from eagle_train.training.model import load_run_tokenizer, model_config

FIRST_BIN = 9
"""Bins of lengths are powers of two; the first one holds everything below 2^9 tokens."""


class SourceNumbers(NamedTuple):
    """A source. hours: of its videos' clips. text_tokens, label_tokens: of its usable rows; label tokens are part of the text tokens.
    duplicates: usable rows that say what an earlier row of the run says, with the same media."""

    name: str
    rows: int
    bad_rows: int
    images: int
    videos: int
    documents: int
    hours: float
    text_tokens: int
    label_tokens: int
    duplicates: int


class Lengths(NamedTuple):
    """Lengths of samples at one context length. before: with all tiles and frames that are wanted. after: with what ADS leaves.
    bins: rows by length, [2, bins], before and after. dropped: rows that don't fit. visual_tokens: by source, after ADS.
    draws: what the first epoch takes from each source, by the stage's mixture or the sources' repeat_time and weight."""

    stage: str
    max_tokens: int
    edges: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dropped: int
    visual_tokens: dict[str, int]
    draws: tuple[SourceDraws, ...]


@dataclass(frozen=True)
class Statistics:
    """Numbers of the run's rows; `reasons` are the most frequent ones in its ledger."""

    run: str
    sources: tuple[SourceNumbers, ...]
    lengths: tuple[Lengths, ...]
    reasons: tuple[str, ...]


def statistics(config: Config, *, evaluation: bool = False) -> Statistics:
    """The numbers of prepared sources (the held-out ones with `evaluation`). Raises PrepareError when they are not prepared."""
    tokenizer = load_run_tokenizer(config)
    facts = load_facts(config, tokenizer, evaluation=evaluation)
    spec = visual_spec(config, model_config(config, tokenizer))
    seen: set[bytes] = set()
    sources = tuple(source_numbers(facts, source, seen) for source in facts.sources)
    lengths = tuple(length_numbers(facts, stage, spec, config.run.seed, draws=not evaluation) for stage in config.stages)
    where = "prepare eval" if evaluation else "prepare"
    ledger = [entry for entry in Ledger(config.run.folder / "ledger.jsonl") if entry.where == where]
    return Statistics(config.run.name, sources, lengths, tuple(top_reasons(ledger)))


def source_numbers(facts: Facts, source: FactsSource, seen: set[bytes]) -> SourceNumbers:
    """Numbers of one source; `seen`: hashes of the samples of earlier sources, to which its own are added."""
    rows = slice(source.first, source.first + source.rows)

    def values(name: str) -> np.ndarray:
        offsets, column = facts.lists(name)
        return column[offsets[rows.start] : offsets[rows.stop]]

    seconds, fps = values("video_seconds").astype(np.float64), values("video_fps").astype(np.float64)
    frame_lists = ~np.isnan(fps)
    listed = (values("video_frames")[frame_lists] / fps[frame_lists]).sum()
    duplicates = 0
    for address in facts.addresses(source):
        try:
            sample = load_sample(address)
        except (RowError, OSError):  # the row changed since it was prepared, which training reports
            continue
        said = repr((sample.messages, [_content(image) for image in sample.images], sample.videos)).encode("utf-8", "backslashreplace")
        digest = hashlib.blake2b(said, digest_size=16).digest()
        duplicates += digest in seen
        seen.add(digest)
    return SourceNumbers(
        source.name,
        source.rows,
        source.bad_rows,
        len(values("image_width")),
        int(np.count_nonzero(~np.isnan(seconds) | frame_lists)),
        int(np.count_nonzero(np.isnan(seconds) & ~frame_lists)),
        float((np.nansum(seconds) + listed) / 3600),
        int(facts.column("text_tokens")[rows].sum()),
        int(facts.column("label_tokens")[rows].sum()),
        duplicates,
    )


def _content(image: object) -> object:
    return hashlib.blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else image


def length_numbers(facts: Facts, stage: StageConfig, spec: VisualSpec, seed: int, *, draws: bool = True) -> Lengths:
    """Lengths of all samples in a stage, how many don't fit, and (not of held-out rows, which a stage doesn't draw) what it draws."""
    before, after = (plan_visual(facts, limit, spec) for limit in (NO_LIMIT, stage.max_tokens))
    fits = after.status == 0
    last = max(int(before.tokens.max(initial=1)).bit_length(), FIRST_BIN + 1)
    edges = tuple(1 << power for power in range(FIRST_BIN, last + 1))
    visual = {}
    for source in facts.sources:
        visual[source.name] = int(after.tiles[source.first : source.first + source.rows].sum()) * spec.tokens_per_tile
    drawn = count_draws(facts, after.tokens, fits, choose_rows(facts, stage, after, seed, 0)[0]) if draws else []
    return Lengths(
        stage.name,
        stage.max_tokens,
        edges,
        _bins(before.tokens, edges),
        _bins(after.tokens[fits], edges),
        int(np.count_nonzero(~fits)),
        visual,
        tuple(drawn),
    )


def _bins(lengths: np.ndarray, edges: tuple[int, ...]) -> tuple[int, ...]:
    """How many lengths are below each edge and not below the one before it."""
    return tuple(np.bincount(np.searchsorted(edges, lengths, side="right"), minlength=len(edges))[: len(edges)].tolist())


def to_html(numbers: Statistics) -> str:
    """One self-contained page."""
    template = files("eagle_train.watching").joinpath("templates/statistics.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(numbers=numbers)


def to_json(numbers: Statistics) -> str:
    """The numbers for programs."""
    content = {
        "run": numbers.run,
        "sources": [source._asdict() for source in numbers.sources],
        "lengths": [length._asdict() | {"draws": [one._asdict() for one in length.draws]} for length in numbers.lengths],
        "reasons": numbers.reasons,
    }
    return json.dumps(content, indent=1, ensure_ascii=False)
