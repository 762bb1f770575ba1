"""A sample or a pack for people: its tiles, its frames with their times, its text coloured by the loss mask, its budget.

`view_sample` turns a planned sample into a `SampleView`: the same prompt and the same tiles that training makes, tiles reduced to
small pictures. `to_html` (one self-contained file) and `to_terminal` (a rich renderable) are pure functions of views.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text as RichText

from eagle_model.prompt import IGNORE_INDEX, Segment, Special, Text, encode
from eagle_model.visual import MediaChanged, SamplePlan, VideoPlan, VideoRef, VisualSpec, describe_concealed, read_image, read_video
from eagle_sampling import Limits, MediaError
from eagle_tiling import Grid, tile_count
from eagle_train.data.sample import Sample
from eagle_train.errors import counted

PICTURE_SIDE = 112
"""Pixels of a tile's picture; as JPEG about 4 kB."""
MOST_PICTURES = 96
"""Pictures of one sample; of more frames, these are shown evenly spread."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One tile, frame or page: a caption, and a JPEG as a data address (None where reading failed, or pictures are off)."""

    caption: str
    data: str | None


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of the prompt: text, a special token, or media. kind: `text`, `special`, `image` or `frame`.

    Media have `pictures`, and `grid` (columns, rows) when they are an image's tiles.
    """

    kind: str
    text: str
    labelled: bool = False
    tokens: int = 0
    grid: Grid | None = None
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleView:
    """Everything that is shown of a sample. `text`, `image`, `frame` are tokens by kind; `planned` is the length in the plan.

    shared: tokens of media that it shares in the pack with the sample before it."""

    source: str
    line: int
    pieces: tuple[Piece, ...]
    length: int
    labels: int
    text: int
    image: int
    frame: int
    planned: int
    budget: int
    notes: tuple[str, ...] = field(default=())
    shared: int = 0


def view_sample(
    sample: Sample,
    plan: SamplePlan,
    spec: VisualSpec,
    tokenizer: Any,
    *,
    budget: int,
    limits: Limits | None = None,
    pictures: bool = True,
) -> SampleView:
    """The prompt and tiles of a planned sample, by the functions that training uses, the tiles reduced to small pictures.

    Args:
        tokenizer: a transformers tokenizer or a `TextEncoder`.
        budget: `max_tokens` of the stage.
        pictures: False reads no media (for the terminal).

    Media that can't be read become notes, not errors, since views are for finding problems.
    """
    segments = plan.render(sample.messages, spec)
    encoded = encode(segments, tokenizer)
    notes: list[str] = []
    image_pictures: list[tuple[Picture, ...]] = [()] * len(plan.grids)
    frame_pictures: list[dict[int, str | None]] = [{}] * len(plan.videos)
    if pictures:
        image_pictures = [
            _image_pictures(ref, grid, size, spec, limits, notes) for ref, grid, size in zip(sample.images, plan.grids, plan.sizes)
        ]
        share = max(1, MOST_PICTURES // max(1, len(plan.videos)))
        frame_pictures = [_frame_pictures(ref, video, share, spec, limits, notes) for ref, video in zip(sample.videos, plan.videos)]
    pieces = tuple(_pieces(segments, plan, image_pictures, frame_pictures))
    by_kind = {kind: sum(piece.tokens for piece in pieces if piece.kind == kind) for kind in ("image", "frame")}
    length = len(encoded.input_ids)
    return SampleView(
        sample.source,
        sample.line,
        pieces,
        length,
        int(np.count_nonzero(encoded.labels != IGNORE_INDEX)),
        length - sum(by_kind.values()),
        by_kind["image"],
        by_kind["frame"],
        plan.tokens,
        budget,
        tuple(notes),
    )


def _pieces(
    segments: Sequence[Segment], plan: SamplePlan, images: list[tuple[Picture, ...]], frames: list[dict[int, str | None]]
) -> Iterator[Piece]:
    for segment in segments:
        if isinstance(segment, Special):
            yield Piece("special", segment.token, segment.labelled)
        elif isinstance(segment, Text):
            yield Piece("text", segment.text, segment.labelled)
        elif segment.media == "image":
            grid = plan.grids[segment.index - 1]
            text = f"image {segment.index}: {grid.cols} x {grid.rows} tiles, {segment.count} tokens"
            yield Piece("image", text, tokens=segment.count, grid=grid, pictures=images[segment.index - 1])
        else:
            video, number = plan.videos[segment.index - 1], segment.frame - 1
            caption = _frame_caption(video, number)
            picture = Picture(caption, frames[segment.index - 1].get(number))
            yield Piece("frame", caption, tokens=segment.count, pictures=(picture,) if picture.data else ())


def _frame_caption(video: VideoPlan, number: int) -> str:
    if video.shown is not None:
        return f"{video.shown[number]:.2f} s"
    return f"page {int(video.indices[number]) + 1}" if video.indices is not None else f"frame {number + 1}"


def _image_pictures(
    ref: Any, grid: Grid, size: tuple[int, int], spec: VisualSpec, limits: Limits | None, notes: list[str]
) -> tuple[Picture, ...]:
    tiles = np.empty((tile_count(grid, thumbnail=spec.thumbnail), spec.tile_size, spec.tile_size, 3), np.uint8)
    try:
        read_image(tiles, ref, grid, size, spec, limits=limits)
    except (MediaError, MediaChanged, OSError) as error:
        notes.append(str(error))
        return ()
    captions = [f"tile {row + 1}, {column + 1}" for row in range(grid.rows) for column in range(grid.cols)]
    captions += ["thumbnail"] * (len(tiles) - len(captions))
    return tuple(Picture(caption, picture_of(tile)) for caption, tile in zip(captions, tiles))


def _frame_pictures(
    ref: VideoRef, plan: VideoPlan, most: int, spec: VisualSpec, limits: Limits | None, notes: list[str]
) -> dict[int, str | None]:
    """Pictures by frame number (0-based), of at most `most` frames."""
    chosen = np.arange(plan.count)
    if plan.count > most:
        chosen = np.unique(np.round(np.linspace(0, plan.count - 1, most)).astype(int))
        notes.append(f"{len(chosen)} of {plan.count} frames are pictured")
    some = replace(
        plan,
        count=len(chosen),
        times=None if plan.times is None else plan.times[chosen],
        indices=None if plan.indices is None else plan.indices[chosen],
    )
    tiles = np.empty((len(chosen), spec.tile_size, spec.tile_size, 3), np.uint8)
    try:
        if concealed := read_video(tiles, ref, some, limits=limits):
            notes.append(describe_concealed(concealed))
    except (MediaError, MediaChanged, OSError) as error:
        notes.append(str(error))
        return {}
    return {int(number): picture_of(tile) for number, tile in zip(chosen, tiles)}


def picture_of(tile: np.ndarray, *, side: int = PICTURE_SIDE) -> str:
    """A tile or frame, uint8 [h, w, 3], as a JPEG in a `data:` address; what is wider than `side` pixels is reduced to a square."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(tile))
    if image.width > side:
        image = image.resize((side, side), Image.Resampling.BOX)
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def _template() -> Any:
    source = (files("eagle_train.watching") / "templates" / "show.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)


def to_html(views: Sequence[SampleView], *, title: str, capacity: int | None = None) -> str:
    """One self-contained page: a sample, or the samples of a pack (then `capacity` is the pack's max_tokens)."""
    return _template().render(
        views=views, title=title, capacity=capacity, total=sum(view.length - view.shared for view in views), groups=_groups
    )


def _groups(pieces: Sequence[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """Pieces in runs: prose (text and special tokens), the tiles of an image, and strips of frames.

    Tags and headers between the frames of a strip are not in the prose, since the captions repeat them.
    """
    kind, run = "prose", []
    for index, piece in enumerate(pieces):
        here = piece.kind if piece.kind in ("image", "frame") else "prose"
        if kind == "frame" and here == "prose" and _between_frames(pieces, index):
            continue
        if run and (here != kind or here == "image"):
            yield kind, run
            run = []
        kind = here
        run.append(piece)
    if run:
        yield kind, run


def to_terminal(views: Sequence[SampleView], *, title: str, capacity: int | None = None, width: int = 60) -> RenderableType:
    """The same for a terminal: no pictures, frames named by their times."""
    parts: list[RenderableType] = []
    if capacity is not None:
        total = sum(view.length - view.shared for view in views)
        bar = _bar([(view.length - view.shared, ("cyan", "blue")[index % 2]) for index, view in enumerate(views)], capacity, width)
        parts += [bar, RichText(f"{total} of {capacity} tokens ({total / capacity:.1%}), {counted(len(views), 'sample')}")]
    for view in views:
        parts.append(Panel(_terminal_sample(view, width), title=f"{view.source}:{view.line}", title_align="left"))
    return Panel(Group(*parts), title=title)


def _terminal_sample(view: SampleView, width: int) -> RenderableType:
    text = RichText(overflow="fold")
    for kind, pieces in _groups(view.pieces):
        if kind == "frame":
            times = [piece.text for piece in pieces]
            shown = times if len(times) <= 6 else [*times[:3], "...", *times[-2:]]
            text.append(f" [{counted(len(times), 'frame')}: {', '.join(shown)}] ", style="magenta")
            continue
        for piece in pieces:
            style = "bold green" if piece.labelled else "dim cyan" if piece.kind == "special" else "magenta" if kind == "image" else ""
            text.append(f" [{piece.text}] " if kind == "image" else piece.text, style=style)
    bar = _bar([(view.text, "green"), (view.image, "magenta"), (view.frame, "yellow")], view.budget, width)
    kinds = f"text {view.text}, images {view.image}, frames {view.frame}"
    numbers = RichText(f"{view.length} of {view.budget} tokens: {kinds}; {view.labels} labels (green)")
    notes = [RichText(note, style="red") for note in view.notes]
    if view.shared:
        notes.append(RichText(f"{view.shared} tokens of media are in the pack once, shared with the sample before this one", style="cyan"))
    return Group(bar, numbers, text, *notes)


def _between_frames(pieces: Sequence[Piece], index: int) -> bool:
    """Whether prose after a frame is its closing tag, or the header and tag in front of the next frame."""
    return pieces[index].text == "</img>" or any(piece.kind == "frame" for piece in pieces[index : index + 3])


def _bar(parts: Sequence[tuple[int, str]], total: int, width: int) -> RichText:
    bar = RichText()
    done = used = 0
    for count, colour in parts:
        done += count
        cells = min(round(done / max(total, 1) * width), width) - used
        bar.append("\u2588" * cells, style=colour)
        used += cells
    bar.append("\u2591" * (width - used), style="dim")
    return bar
