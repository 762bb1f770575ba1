"""A pack of planned samples becomes arrays: ids, targets, positions, loss weights and tiles. Here pixels are read, once.

Nothing is substituted. A sample whose media can't be read any more is left out of the pack and its reason is kept in `failed`; because
loss denominators are summed from the batches that really came (`label_weight`), they stay right.
No torch in this module: it runs in the loader's processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from eagle_model.prompt import IGNORE_INDEX, IMG_CONTEXT, PromptError, VideoSpan, encode, media_order, render
from eagle_sampling import Limits, MediaError, open_image, read_frames
from eagle_tiling import load_rgb, tile_count, tile_image
from eagle_train.data.encoding import CachedEncoder
from eagle_train.data.facts import Facts
from eagle_train.data.ledger import Entry
from eagle_train.data.sample import RowError, Sample, VideoRef, normalise, read_row
from eagle_train.planning.visual import ModelFacts, SamplePlan

Weighting = Literal["token", "sample", "sqrt"]
FRAMES_TIMEOUT = 300.0
"""Seconds that the frames of one video may take: the readers' own limit, before the loader stops waiting for the process."""


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


class MaterialiseError(ValueError):
    """A sample that can't become tokens and tiles: `reason` to count by, `detail` for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass
class Batch:
    """One pack as arrays. T tokens, N tiles of s x s pixels, S samples.

    input_ids, targets (shifted: what stands next, -100 ignored), position_ids: int64 [T]; cu_seqlens: S + 1 offsets;
    tiles: uint8 [N, s, s, 3]; context_index: int64 [N * k], where the image tokens stand; token_weights: float32 [T];
    num_kept: targets that carry loss; label_weight: sum of their weights; sample_ids: (source, line) of each sample;
    planned_tokens: what the plan expected (an upper bound); failed: samples that are missing, and why.
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
    planned_tokens: int = 0
    failed: tuple[Entry, ...] = ()
    seconds_by_source: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of samples (an empty pack has one token of padding, which is no sample's)."""
        return len(self.input_ids) if self.sample_ids else 0

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


def read_tiles(sample: Sample, plan: SamplePlan, model: ModelFacts, *, thumbnail: bool, limits: Limits) -> np.ndarray:
    """Tiles of a sample in the order of its prompt, uint8 [N, s, s, 3]. Raises MediaError, or MaterialiseError for changed media."""
    side = model.tile_size
    if (len(sample.images), len(sample.videos)) != (len(plan.grids), len(plan.videos)):
        raise MaterialiseError("changed", "the row has other media than when it was prepared; run eagle prepare again")
    parts = []
    for medium in media_order(sample.messages, len(sample.images), len(sample.videos)):
        if medium.kind == "image":
            grid = plan.grids[medium.number - 1]
            with open_image(sample.images[medium.number - 1], limits=limits) as image:
                parts.append(tile_image(image, grid, tile_size=side, thumbnail=thumbnail))
        else:
            parts.append(_read_video(sample.videos[medium.number - 1], plan.videos[medium.number - 1], side, limits))
    return np.concatenate(parts) if parts else np.zeros((0, side, side, 3), np.uint8)


def _read_video(ref: VideoRef, plan: Any, side: int, limits: Limits) -> np.ndarray:
    if plan.times is not None:
        if ref.path is None:
            raise MaterialiseError("changed", "a video became a document since prepare; run eagle prepare again")
        return read_frames(ref.path, plan.times, side, timeout=FRAMES_TIMEOUT, limits=limits).pixels
    if ref.path is not None:
        from eagle_train.data.documents import render_pages

        return render_pages(ref.path, plan.pages, side)
    pages = []
    for number in plan.pages.tolist():
        if number >= len(ref.pages):
            raise MaterialiseError("changed", f"page {number + 1} of {len(ref.pages)} is gone; run eagle prepare again")
        with open_image(ref.pages[number], limits=limits) as image:
            pages.append(np.asarray(load_rgb(image).resize((side, side), 3)))
    return np.stack(pages)


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
    skip: dict[int, Entry] | None = None,
    on_sample: Callable[[int, Address], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> Batch:
    """Read the samples of a pack.

    skip: samples (by place in the pack) that are already known not to work, with their ledger entries.
    on_sample: called before each sample, for whoever watches the time. clock: seconds, to account reading to sources.
    """
    limits = limits or Limits()
    done: list[tuple[Planned, Tokenised, np.ndarray]] = []
    failed: list[Entry] = []
    seconds: dict[str, float] = {}
    for place, planned in enumerate(pack):
        if skip and place in skip:
            failed.append(skip[place])
            continue
        address, plan = planned
        if on_sample is not None:
            on_sample(place, address)
        begin = clock() if clock else 0.0
        try:
            sample = load_sample(address)
            tokens = tokenise(sample, plan, encoder, model.tokens_per_tile, thumbnail=thumbnail)
            if len(tokens.input_ids) > plan.tokens:
                raise MaterialiseError("changed", f"the row has {len(tokens.input_ids)} tokens, prepare counted {plan.tokens}")
            done.append((planned, tokens, read_tiles(sample, plan, model, thumbnail=thumbnail, limits=limits)))
        except (RowError, MaterialiseError) as error:
            failed.append(Entry(address.source, address.line, error.reason, error.detail, "train"))
        except (MediaError, PromptError, OSError) as error:
            failed.append(Entry(address.source, address.line, "unreadable", str(error), "train"))
        if clock:
            seconds[address.source] = seconds.get(address.source, 0.0) + clock() - begin
    batch = assemble([(p.address, tokens, tiles) for p, tokens, tiles in done], encoder, model, weighting=weighting)
    batch.planned_tokens = sum(planned.plan.tokens for planned in pack)
    batch.failed, batch.seconds_by_source = tuple(failed), seconds
    return batch


def assemble(
    samples: Sequence[tuple[Address, Tokenised, np.ndarray]], encoder: CachedEncoder, model: ModelFacts, *, weighting: Weighting
) -> Batch:
    """Join tokenised samples and their tiles. Without any sample: one ignored token, so that every rank has something to run."""
    side = model.tile_size
    if not samples:
        nothing = np.full(1, IGNORE_INDEX, np.int64)
        zero = np.zeros(1, np.int64)
        return Batch(zero, nothing, zero, (0, 1), np.zeros((0, side, side, 3), np.uint8), zero[:0], np.zeros(1, np.float32), 0, 0.0, ())
    ids = np.concatenate([tokens.input_ids for _, tokens, _ in samples])
    targets = np.full(len(ids), IGNORE_INDEX, np.int64)
    weights = np.zeros(len(ids), np.float32)
    positions = np.empty(len(ids), np.int64)
    offsets = [0]
    kept, total = 0, 0.0
    for _, tokens, _ in samples:
        start, stop = offsets[-1], offsets[-1] + len(tokens.input_ids)
        offsets.append(stop)
        targets[start : stop - 1] = tokens.labels[1:]
        labels = int(np.count_nonzero(tokens.labels[1:] != IGNORE_INDEX))
        weight = token_weight(labels, weighting)
        weights[start:stop] = np.where(targets[start:stop] != IGNORE_INDEX, np.float32(weight), np.float32(0))
        positions[start:stop] = np.arange(stop - start)
        kept += labels
        total += labels * float(np.float32(weight))
    tiles = np.concatenate([tiles for _, _, tiles in samples])
    context = np.flatnonzero(ids == encoder.token_id(IMG_CONTEXT))
    if len(context) != len(tiles) * model.tokens_per_tile:
        raise ValueError(f"{len(context)} image tokens for {len(tiles)} tiles of {model.tokens_per_tile}: prompt and tiles disagree")
    sample_ids = tuple((address.source, address.line) for address, _, _ in samples)
    return Batch(ids, targets, positions, tuple(offsets), tiles, context, weights, kept, total, sample_ids)
