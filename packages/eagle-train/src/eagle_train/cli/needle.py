"""`eagle needle build` and `eagle needle plot`: a needle-in-a-video benchmark, and its results by frames and depth."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .app import app

needle_app = typer.Typer(help="Needles in videos: build a benchmark, or plot results on it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(needle_app, name="needle")


@needle_app.command("build")
def build(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder.", show_default=False)],
    hosts: Annotated[
        list[Path] | None,
        typer.Option("--host", help="Video, or folder of videos, to put needles into; default: generated.", metavar="PATH"),
    ] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of needles.", metavar="NAME,...")] = "still,motion,order,count,linked",
    lengths: Annotated[str, typer.Option(help="Lengths of the videos in seconds.", metavar="S,...")] = "30",
    depths: Annotated[str, typer.Option(help="Where needles are: 0 start, 1 end.", metavar="X,...")] = "0,0.25,0.5,0.75,1",
    count: Annotated[int, typer.Option(min=1, help="Videos for every kind, length and depth.", metavar="N")] = 2,
    rotations: Annotated[int, typer.Option(min=1, max=4, help="Rows per video, with rotated options.", metavar="N")] = 4,
    card_seconds: Annotated[float, typer.Option(min=0.01, help="How long a card is shown.", metavar="S")] = 1.0,
    side: Annotated[int, typer.Option(min=32, help="Side of the videos in pixels.", metavar="N")] = 224,
    fps: Annotated[int, typer.Option(min=1, help="Frames per second of the videos.", metavar="N")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random; train and evaluate with different ones.", metavar="N")] = 0,
) -> None:
    """Write videos with needles, and rows about them.

    They train and evaluate like any other rows: eagle eval RUN --data OUTPUT/rows.jsonl.
    """
    from eagle_train.evaluation.needle import Settings
    from eagle_train.evaluation.needle import build as build_needles

    from .progress import Printer

    settings = Settings(
        kinds=tuple(part.strip() for part in kinds.split(",") if part.strip()),
        lengths=_numbers("--lengths", lengths),
        depths=_numbers("--depths", depths),
        count=count,
        rotations=rotations,
        card_seconds=card_seconds,
        side=side,
        fps=fps,
        hosts=tuple(hosts or ()),
        seed=seed,
    )
    with Printer(silent=False).counting("videos") as counted:
        made = build_needles(output.absolute(), settings, counted)
    print(f"{output}: {made['videos']} videos, {made['rows']} rows")
    print(f"evaluate: eagle eval RUN --data {shlex.quote(str(output / 'rows.jsonl'))} --metric choice --frames 16,32,64")


@needle_app.command("plot")
def plot(
    evaluation: Annotated[Path, typer.Argument(metavar="EVALUATION", help="Folder of eagle eval --frames.", show_default=False)],
    needles: Annotated[Path, typer.Argument(metavar="NEEDLES", help="Folder of eagle needle build.", show_default=False)],
) -> None:
    """Draw accuracy by number of frames and depth.

    EVALUATION/depths.png has a part for every kind of needle.
    """
    from eagle_train.evaluation.needle import NeedleError
    from eagle_train.training.metrics import read_metrics
    from eagle_train.watching.accuracy import plot_depths

    files = evaluation / "answers.jsonl", needles / "needles.jsonl"
    for file in files:
        if not file.is_file():
            raise NeedleError(f"{file}: there is no such file; EVALUATION is a folder of eagle eval, NEEDLES one of eagle needle build")
    answers, about = (list(read_metrics(file)) for file in files)
    try:
        print(plot_depths(answers, {needle["line"]: needle for needle in about}, evaluation / "depths.png"))
    except ValueError as error:
        raise NeedleError(str(error)) from error


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from eagle_train.evaluation.needle import NeedleError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise NeedleError(f"{option} {text}: expected numbers, separated by commas") from None
