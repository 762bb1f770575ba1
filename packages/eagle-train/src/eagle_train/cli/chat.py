"""`eagle chat`: questions about images and videos."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app
from .options import Device, ModelFolder

if TYPE_CHECKING:
    from eagle_train.runs.chat import Chat

HINT = "/image FILE and /video FILE attach a medium to the next question; an empty line ends the conversation"


@app.command()
def chat(
    folder: ModelFolder,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="Default: a conversation.", show_default=False)] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be repeated.", metavar="FILE", show_default=False)] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="Video file or PDF document; may be repeated.", metavar="FILE", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message; default: that of the model.", metavar="TEXT", show_default=False)
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of video; default: as trained.", metavar="FPS", show_default=False)
    ] = None,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Most tiles of an image; default: as trained.", metavar="N", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most probable token; larger values sample.", metavar="T")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.", metavar="N")] = 256,
    device: Device = None,
    web: Annotated[bool, typer.Option("--web", help="A page on this machine's http://127.0.0.1 instead (extra web).")] = False,
    port: Annotated[int, typer.Option(help="Port of --web.", metavar="PORT", min=1, max=65535)] = 7860,
) -> None:
    """Answer questions about images, videos and documents.

    In a conversation /image FILE and /video FILE attach a medium to the next question, and an empty line ends it.
    """
    from .progress import quiet

    quiet()
    if web:
        from eagle_train.config import ConfigError
        from eagle_train.runs.web import run_page

        if question is not None or image or video or fps or max_tiles or temperature or max_new_tokens != 256:
            raise ConfigError("--web takes questions, media and parameters on the page; it goes with --system, --port and --device only")
        run_page(folder, port=port, device=device, system=system)
        return
    from eagle_train.runs.chat import Chat

    conversation = Chat.open(
        folder,
        images=image or (),
        videos=video or (),
        device=device,
        system=system,
        fps=fps,
        max_tiles=max_tiles,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
    if question is not None:
        print(conversation.answer(question))
    else:
        print(HINT, file=sys.stderr)
        converse(conversation, lines())


def lines() -> Iterator[str]:
    """Lines of standard input up to an empty one, each after a prompt."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def converse(conversation: Chat, questions: Iterator[str]) -> None:
    """Answer every question; one that can't be answered is reported and its media are dropped, and the conversation continues."""
    from eagle_model import ModelError
    from eagle_sampling import MediaError

    media: dict[str, list[Path]] = {"image": [], "video": []}
    for line in questions:
        command, _, name = line.partition(" ")
        if command in ("/image", "/video"):
            path = Path(name.strip()).expanduser()
            if path.is_file():
                media[command[1:]].append(path)
            else:
                print(f"error: {command}: {name.strip() or 'no file is named'}: there is no such file", file=sys.stderr)
            continue
        try:
            print(conversation.answer(line, media["image"], media["video"]))
        except (ModelError, MediaError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        media = {"image": [], "video": []}
