"""`eagle chat`: questions about images and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Device, ModelFolder


@app.command()
def chat(
    folder: ModelFolder,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="Default: a conversation.", show_default=False)] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be repeated.", metavar="FILE", show_default=False)] = None,
    video: Annotated[list[Path] | None, typer.Option(help="Video file; may be repeated.", metavar="FILE", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", metavar="N")] = 256,
    device: Device = None,
    web: Annotated[bool, typer.Option("--web", help="A page on this machine's http://127.0.0.1 instead (extra web).")] = False,
    port: Annotated[int, typer.Option(help="Port of --web.", metavar="PORT", min=1, max=65535)] = 7860,
) -> None:
    """Answer a question about images and videos, or hold a conversation (an empty line ends it)."""
    from .progress import quiet

    quiet()
    if web:
        from eagle_train.config import ConfigError
        from eagle_train.runs.web import run_page

        if question is not None or image or video:
            raise ConfigError("--web takes questions, images and videos on the page; leave them out of the command")
        run_page(folder, port=port, device=device)
        return
    from eagle_train.runs.chat import Chat

    conversation = Chat.open(folder, images=image or (), videos=video or (), device=device, max_new_tokens=max_new_tokens)
    if question is not None:
        print(conversation.answer(question))
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        print(conversation.answer(line))
