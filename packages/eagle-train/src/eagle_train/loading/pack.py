"""A pack of planned samples becomes a packed batch: ids, targets, positions, loss weights and tiles. Pixels are read here, once.

Nothing is substituted. A sample whose media can't be read any more is missing from the pack and its reason is in `missing`; loss
denominators stay right, because they are summed from the batches that were made (`label_weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from eagle_model.batch import PackedBatch
from eagle_model.prompt import IGNORE_INDEX, IMG_CONTEXT, CachedEncoder, Encoded, PromptError, encode, share_prefix
from eagle_model.visual import Concealed, MediaChanged, VisualSpec, describe_concealed, read_tiles_into
from eagle_sampling import Limits, MediaError
from eagle_train.data.ledger import Entry
from eagle_train.data.sample import Address, RowError, Sample, load_sample
from eagle_train.planning.stages import Planned, pack_tokens

Weighting = Literal["token", "sample", "sqrt"]


class Share(NamedTuple):
    """The part of each pack's tiles that a process reads: those of rank `rank` of `ranks`, as `eagle_cp.plan_tiles` spreads them."""

    rank: int = 0
    ranks: int = 1

    def of(self, tiles: int) -> tuple[int, int]:
        """First of this rank's tiles and the one after its last, of `tiles`."""
        return self.rank * tiles // self.ranks, (self.rank + 1) * tiles // self.ranks


WHOLE = Share()


@dataclass(frozen=True)
class LoadedPack:
    """A packed batch and where it comes from.

    batch: numpy arrays of the whole pack; its tiles are this process's share. sample_ids: (source, line) of each sample. tile_count: tiles
    of the whole pack. planned_tokens: tokens of the plan (an upper bound). missing: place in the pack -> ledger entry.
    document_sources: source of every document of the batch (`cu_seqlens`), none of an empty pack; a tree has one more than samples.
    seconds_by_source: reading time by source.
    concealed: of samples that are used, with damaged frames in this share; concealed_frames: how
    many frames.
    """

    batch: PackedBatch
    sample_ids: tuple[tuple[str, int], ...] = ()
    tile_count: int = 0
    planned_tokens: int = 0
    missing: dict[int, Entry] = field(default_factory=dict)
    document_sources: tuple[str, ...] = ()
    seconds_by_source: dict[str, float] = field(default_factory=dict)
    concealed: tuple[Entry, ...] = ()
    concealed_frames: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of samples (an empty pack has one token of padding, which belongs to no sample)."""
        return self.batch.cu_seqlens[-1] if self.sample_ids else 0

    @property
    def failed(self) -> tuple[Entry, ...]:
        """Why samples are missing."""
        return tuple(self.missing.values())


def token_weight(labels: int, weighting: Weighting) -> float:
    """Loss weight of each label token of a sample with `labels` of them (spec section 6)."""
    return {"token": 1.0, "sample": 1.0 / max(labels, 1), "sqrt": max(labels, 1) ** -0.5}[weighting]


def load_pack(
    pack: Sequence[Planned],
    encoder: CachedEncoder,
    spec: VisualSpec,
    *,
    weighting: Weighting = "sqrt",
    limits: Limits | None = None,
    share: Share = WHOLE,
    skip: dict[int, Entry] | None = None,
    change: Callable[[int, Sample], Sample] | None = None,
    on_sample: Callable[[int, Address], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> LoadedPack:
    """Read the samples of a pack: the text of all, and the tiles of this process's share.

    Samples of a tree (`Planned.tree`) share their media: the tiles are read once, and a medium that can't be read is missing for all of
    them. A sample of a tree whose row no longer begins as the others do is missing alone.

    skip: samples (by place in the pack) that are known to be unreadable, with their ledger entries. change: what a sample is read as, by
    its place (evaluation puts other answers in); the plan must hold for it.
    on_sample: called with the place of each sample before it is read. clock: seconds, for the reading time by source.
    With more than one rank a sample that can't be read changes the shares of all: see `eagle_train.distributed.agreement`.
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
        except RowError as error:
            missing[place] = Entry(address.source, address.line, error.reason, error.detail, "train")
        except MediaChanged as error:
            missing[place] = Entry(address.source, address.line, error.reason, str(error), "train")
        except (MediaError, PromptError, OSError) as error:
            missing[place] = Entry(address.source, address.line, "unreadable", str(error), "train")
        finally:
            if clock:
                seconds[address.source] = seconds.get(address.source, 0.0) + clock() - begin
        return None

    def read_text(place: int) -> tuple[Sample, Encoded]:
        planned = pack[place]
        sample = load_sample(planned.address)
        if change is not None:
            sample = change(place, sample)
        tokens = encode(planned.plan.render(sample.messages, spec), encoder)
        if len(tokens.input_ids) > planned.plan.tokens:
            raise MediaChanged(f"the row has {len(tokens.input_ids)} tokens, prepare counted {planned.plan.tokens}")
        return sample, tokens

    image_token = encoder.token_id(IMG_CONTEXT)
    rows: dict[int, tuple[Sample, Encoded]] = {}
    trees: dict[int, list[int]] = {}  # the first sample that can be read of each tree, and the others; a sample alone
    of_tree: dict[int, int] = {}  # number of a tree -> its first sample

    def read_branch(place: int) -> tuple[Sample, Encoded]:
        """`read_text`, which must begin as the first sample of the tree does, through the last visual token."""
        row = read_text(place)
        tree = pack[place].tree
        if tree is not None and tree in of_tree:
            first, tokens = rows[of_tree[tree]]
            stop = int(np.flatnonzero(tokens.input_ids == image_token)[-1]) + 1
            same_text = np.array_equal(row[1].input_ids[:stop], tokens.input_ids[:stop])
            if not same_text or (row[0].images, row[0].videos) != (first.images, first.videos):
                raise MediaChanged(
                    f"the row no longer has the media of {first.source}:{first.line}, with which it shares them; prepare again"
                )
        return row

    for place in range(len(pack)):
        if place in skip:
            missing[place] = skip[place]
        elif (row := attempt(place, partial(read_branch, place))) is not None:
            rows[place] = row
            tree = pack[place].tree
            if tree is None or tree not in of_tree:
                trees[place] = [place]
                if tree is not None:
                    of_tree[tree] = place
            else:
                trees[of_tree[tree]].append(place)

    counts = {place: pack[place].plan.tile_count(spec) for place in trees}
    first, last = share.of(sum(counts.values()))
    tiles = np.empty((last - first, spec.tile_size, spec.tile_size, 3), np.uint8)
    concealed: list[Entry] = []
    filled, start, frames = 0, 0, 0  # start: the sample's first tile in the pack
    for place, count in counts.items():
        begin, end = max(first - start, 0), min(last - start, count)
        start += count
        if begin >= end:
            continue
        part, sample = tiles[filled : filled + end - begin], rows[place][0]
        read = partial(
            read_tiles_into, part, sample.messages, sample.images, sample.videos, pack[place].plan, spec, first=begin, limits=limits
        )
        damaged: list[Concealed] = attempt(place, read) or []
        if place in missing:  # the next sample's tiles take the room
            for branch in trees.pop(place):
                address = pack[branch].address
                missing[branch] = replace(missing[place], source=address.source, line=address.line)
                del rows[branch]
        else:
            filled += end - begin
            if damaged:
                address = pack[place].address
                concealed.append(Entry(address.source, address.line, "concealed", describe_concealed(damaged), "train"))
                frames += len(damaged)
    # A share of a pack that lost a sample is another share: such a batch is read again.
    whole = share.ranks == 1 or len(trees) == len(counts)
    samples, prefixes = _documents([[rows[place][1] for place in places] for places in trees.values()], image_token)
    batch, tile_count = join_samples(
        samples, tiles[:filled], encoder, spec, weighting=weighting, share=share if whole else None, prefixes=prefixes
    )
    return LoadedPack(
        batch,
        tuple((pack[place].address.source, pack[place].address.line) for places in trees.values() for place in places),
        tile_count,
        pack_tokens(pack),
        dict(sorted(missing.items())),
        tuple(pack[place].address.source for place, branches in trees.items() for _ in range(len(branches) + (len(branches) > 1))),
        seconds,
        tuple(concealed),
        frames,
    )


def _documents(trees: Sequence[Sequence[Encoded]], image_token: int) -> tuple[list[Encoded], tuple[int, ...]]:
    """Prefixes, branches and samples alone, in the order of a pack, and what each one continues (empty: nothing is shared)."""
    documents: list[Encoded] = []
    prefixes: list[int] = []
    for samples in trees:
        if len(samples) == 1:
            documents += samples
            prefixes.append(-1)
            continue
        last_visual = int(np.flatnonzero(samples[0].input_ids == image_token)[-1])
        shared = share_prefix(samples, at_least=last_visual + 1)
        prefixes += [-1, *[len(documents)] * len(samples)]
        documents += shared.documents
    return documents, tuple(prefixes) if any(prefix >= 0 for prefix in prefixes) else ()


def join_samples(
    samples: Sequence[Encoded],
    tiles: np.ndarray,
    encoder: CachedEncoder,
    spec: VisualSpec,
    *,
    weighting: Weighting,
    share: Share | None = WHOLE,
    prefixes: Sequence[int] = (),
) -> tuple[PackedBatch, int]:
    """One batch of tokenised samples, and the number of their tiles, of which `tiles` are this share (None: what could be read of it, and
    the batch is to be read again). prefixes: for trees, the place of the sample that each one continues, or -1 (`PackedBatch.prefixes`).

    Without any sample: one ignored token, so that every rank has something to run. Raises ValueError when ids and tiles disagree.
    """
    if not samples:
        nothing = np.full(1, IGNORE_INDEX, np.int64)
        zero = np.zeros(1, np.int64)
        return PackedBatch(zero, nothing, zero, np.zeros(1, np.float32), (0, 1), tiles[:0], zero[:0], 0, 0.0), 0
    ids = np.concatenate([tokens.input_ids for tokens in samples])
    targets = np.full(len(ids), IGNORE_INDEX, np.int64)
    weights = np.zeros(len(ids), np.float32)
    positions = np.empty(len(ids), np.int64)
    offsets = [0]
    kept, total = 0, 0.0
    for number, tokens in enumerate(samples):
        start, stop = offsets[-1], offsets[-1] + len(tokens.input_ids)
        offsets.append(stop)
        targets[start : stop - 1] = tokens.labels[1:]
        labels = int(np.count_nonzero(tokens.labels[1:] != IGNORE_INDEX))
        weight = token_weight(labels, weighting)
        weights[start:stop] = np.where(targets[start:stop] != IGNORE_INDEX, np.float32(weight), np.float32(0))
        positions[start:stop] = np.arange(stop - start)
        if prefixes and prefixes[number] >= 0:
            positions[start:stop] += len(samples[prefixes[number]].input_ids)
        kept += labels
        total += labels * float(np.float32(weight))
    visual = np.flatnonzero(ids == encoder.token_id(IMG_CONTEXT))
    count, rest = divmod(len(visual), spec.tokens_per_tile)
    if rest or (share is not None and len(tiles) != np.diff(share.of(count))):
        raise ValueError(f"{len(visual)} visual tokens for {len(tiles)} tiles of {spec.tokens_per_tile}: prompt and tiles disagree")
    batch = PackedBatch(ids, targets, positions, weights, tuple(offsets), tiles, visual, kept, total, prefixes=tuple(prefixes))
    return batch, count
