"""A pack of planned samples becomes arrays: ids, targets, positions, loss weights and tiles. Here pixels are read, once.

Nothing is substituted. A sample whose media can't be read any more is left out of the pack and its reason is kept in `missing`; because
loss denominators are summed from the batches that really came (`label_weight`), they stay right.
No torch in this module: it runs in the loader's processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from eagle_model.prompt import IGNORE_INDEX, IMG_CONTEXT, PromptError, VideoSpan, encode, render
from eagle_sampling import Limits, MediaError
from eagle_tiling import tile_count
from eagle_train.data.encoding import CachedEncoder
from eagle_train.data.facts import Facts
from eagle_train.data.ledger import Entry
from eagle_train.data.sample import RowError, Sample, normalise, read_row
from eagle_train.planning.visual import ModelFacts, SamplePlan

from .pixels import MaterialiseError, count_tiles, read_tiles_into

Weighting = Literal["token", "sample", "sqrt"]


class Address(NamedTuple):
    """Where a row stands, so that a worker reads it without the facts."""

    source: str
    line: int
    annotation: str
    offset: int
    size: int
    root: str
    system: str | None


class Planned(NamedTuple):
    """A sample of a pack: where its row is, and what it gets."""

    address: Address
    plan: SamplePlan


class Share(NamedTuple):
    """The part of each pack's tiles that a process reads: those of rank `rank` of `ranks`, as `eagle_cp.exchange_tiles` spreads them."""

    rank: int = 0
    ranks: int = 1

    def of(self, tiles: int) -> tuple[int, int]:
        """First of this rank's tiles and the one after its last, of `tiles`."""
        return self.rank * tiles // self.ranks, (self.rank + 1) * tiles // self.ranks


WHOLE = Share()


@dataclass
class Batch:
    """One pack as arrays. T tokens, N tiles of s x s pixels, S samples.

    input_ids, targets (shifted: what stands next, -100 ignored), position_ids: int64 [T]; cu_seqlens: S + 1 offsets;
    tiles: uint8 [N, s, s, 3], or a rank's share of the N; context_index: int64 [N * k], where the image tokens stand;
    token_weights: float32 [T]; num_kept: targets that carry loss; label_weight: sum of their weights; sample_ids: (source, line) of each
    sample; tile_count: N; planned_tokens: what the plan expected (an upper bound); missing: place in the pack -> why it isn't here.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: tuple[int, ...]
    tiles: np.ndarray
    context_index: np.ndarray
    token_weights: np.ndarray
    num_kept: int
    label_weight: float
    sample_ids: tuple[tuple[str, int], ...]
    tile_count: int = 0
    planned_tokens: int = 0
    missing: dict[int, Entry] = field(default_factory=dict)
    seconds_by_source: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of samples (an empty pack has one token of padding, which is no sample's)."""
        return len(self.input_ids) if self.sample_ids else 0

    @property
    def failed(self) -> tuple[Entry, ...]:
        """Why samples are missing."""
        return tuple(self.missing.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.input_ids, self.targets, self.position_ids, self.tiles, self.context_index, self.token_weights)
        return sum(array.nbytes for array in arrays)


class Tokenised(NamedTuple):
    """One sample without its pixels: ids and labels int64 [n], not shifted."""

    input_ids: np.ndarray
    labels: np.ndarray


def address_of(facts: Facts, row: int) -> Address:
    """Where row `row` of the facts stands."""
    source = facts.source_of(row)
    line, offset, size = (facts.table.column(name)[row].as_py() for name in ("line", "offset", "size"))
    return Address(source.name, line, str(source.annotation), offset, size, str(source.root), facts.system)


def load_sample(address: Address) -> Sample:
    """Read and normalise the row; raises RowError or OSError when the file changed since prepare."""
    row = read_row(address.annotation, address.offset, address.size)
    return normalise(row, address.source, root=address.root, line=address.line, system=address.system)


def tokenise(sample: Sample, plan: SamplePlan, encoder: CachedEncoder, k: int, *, thumbnail: bool, generation: bool = False) -> Tokenised:
    """Ids and labels of a planned sample. `generation`: end with the assistant's header instead of an answer."""
    images = [tile_count(grid, thumbnail=thumbnail) * k for grid in plan.grids]
    videos = [
        VideoSpan(None if video.shown is None else video.shown.tolist(), video.fps, k, frames=video.count if video.shown is None else None)
        for video in plan.videos
    ]
    segments = render(sample.messages, images=images, videos=videos, add_generation_prompt=generation)
    return Tokenised(*encode(segments, encoder))


def token_weight(labels: int, weighting: Weighting) -> float:
    """Loss weight of each label token of a sample with `labels` of them (spec section 6)."""
    return {"token": 1.0, "sample": 1.0 / max(labels, 1), "sqrt": max(labels, 1) ** -0.5}[weighting]


def materialise(
    pack: Sequence[Planned],
    encoder: CachedEncoder,
    model: ModelFacts,
    *,
    thumbnail: bool = True,
    weighting: Weighting = "sqrt",
    limits: Limits | None = None,
    share: Share = WHOLE,
    skip: dict[int, Entry] | None = None,
    on_sample: Callable[[int, Address], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> Batch:
    """Read the samples of a pack: the text of all, and the tiles of this process's share.

    skip: samples (by place in the pack) that are already known not to work, with their ledger entries.
    on_sample: called before each sample, for whoever watches the time. clock: seconds, to account reading to sources.
    With more than one rank a sample that can't be read moves the shares of all: see `sharing.agree`.
    """
    limits, skip = limits or Limits(), skip or {}
    missing: dict[int, Entry] = {}
    seconds: dict[str, float] = {}

    def attempt(place: int, work: Callable[[], Any]) -> Any:
        """What `work` returns, or None when the sample is bad."""
        address = pack[place].address
        if on_sample is not None:
            on_sample(place, address)
        begin = clock() if clock else 0.0
        try:
            return work()
        except (RowError, MaterialiseError) as error:
            missing[place] = Entry(address.source, address.line, error.reason, error.detail, "train")
        except (MediaError, PromptError, OSError) as error:
            missing[place] = Entry(address.source, address.line, "unreadable", str(error), "train")
        finally:
            if clock:
                seconds[address.source] = seconds.get(address.source, 0.0) + clock() - begin
        return None

    def read_text(planned: Planned) -> tuple[Sample, Tokenised]:
        sample = load_sample(planned.address)
        tokens = tokenise(sample, planned.plan, encoder, model.tokens_per_tile, thumbnail=thumbnail)
        if len(tokens.input_ids) > planned.plan.tokens:
            raise MaterialiseError("changed", f"the row has {len(tokens.input_ids)} tokens, prepare counted {planned.plan.tokens}")
        return sample, tokens

    rows: dict[int, tuple[Sample, Tokenised]] = {}
    for place, planned in enumerate(pack):
        if place in skip:
            missing[place] = skip[place]
        elif (row := attempt(place, partial(read_text, planned))) is not None:
            rows[place] = row

    counts = {place: count_tiles(pack[place].plan, thumbnail=thumbnail) for place in rows}
    first, last = share.of(sum(counts.values()))
    tiles = np.empty((last - first, model.tile_size, model.tile_size, 3), np.uint8)
    filled, start = 0, 0  # start: the sample's first tile in the pack
    for place, count in counts.items():
        begin, end = max(first - start, 0), min(last - start, count)
        start += count
        if begin >= end:
            continue
        part = tiles[filled : filled + end - begin]
        attempt(place, partial(read_tiles_into, part, rows[place][0], pack[place].plan, begin, thumbnail=thumbnail, limits=limits))
        if place in missing:
            del rows[place]  # the next sample's tiles take the room
        else:
            filled += end - begin
    whole = share.ranks == 1 or len(rows) == len(counts)
    samples = [(pack[place].address, tokens) for place, (_, tokens) in rows.items()]
    batch = assemble(samples, tiles[:filled], encoder, model, weighting=weighting, share=share if whole else None)
    batch.planned_tokens = sum(planned.plan.tokens for planned in pack)
    batch.missing, batch.seconds_by_source = dict(sorted(missing.items())), seconds
    return batch


def assemble(
    samples: Sequence[tuple[Address, Tokenised]],
    tiles: np.ndarray,
    encoder: CachedEncoder,
    model: ModelFacts,
    *,
    weighting: Weighting,
    share: Share | None = WHOLE,
) -> Batch:
    """Join tokenised samples; `tiles` are this share of theirs (None: what could be read of it, and the batch is to be read again).

    Without any sample: one ignored token, so that every rank has something to run.
    """
    if not samples:
        nothing = np.full(1, IGNORE_INDEX, np.int64)
        zero = np.zeros(1, np.int64)
        return Batch(zero, nothing, zero, (0, 1), tiles[:0], zero[:0], np.zeros(1, np.float32), 0, 0.0, ())
    ids = np.concatenate([tokens.input_ids for _, tokens in samples])
    targets = np.full(len(ids), IGNORE_INDEX, np.int64)
    weights = np.zeros(len(ids), np.float32)
    positions = np.empty(len(ids), np.int64)
    offsets = [0]
    kept, total = 0, 0.0
    for _, tokens in samples:
        start, stop = offsets[-1], offsets[-1] + len(tokens.input_ids)
        offsets.append(stop)
        targets[start : stop - 1] = tokens.labels[1:]
        labels = int(np.count_nonzero(tokens.labels[1:] != IGNORE_INDEX))
        weight = token_weight(labels, weighting)
        weights[start:stop] = np.where(targets[start:stop] != IGNORE_INDEX, np.float32(weight), np.float32(0))
        positions[start:stop] = np.arange(stop - start)
        kept += labels
        total += labels * float(np.float32(weight))
    context = np.flatnonzero(ids == encoder.token_id(IMG_CONTEXT))
    count, rest = divmod(len(context), model.tokens_per_tile)
    if rest or (share is not None and len(tiles) != np.diff(share.of(count))):
        raise ValueError(f"{len(context)} image tokens for {len(tiles)} tiles of {model.tokens_per_tile}: prompt and tiles disagree")
    sample_ids = tuple((address.source, address.line) for address, _ in samples)
    return Batch(ids, targets, positions, tuple(offsets), tiles, context, weights, kept, total, sample_ids, count)
