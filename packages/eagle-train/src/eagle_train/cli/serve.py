"""`eagle serve`: vLLM's OpenAI-compatible server for an exported or released model."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of an exported or released model.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", metavar="PORT", min=1, max=65535)] = 8000,
    max_tokens: Annotated[
        int | None, typer.Option(help="Context length; default: that of training.", metavar="N", min=1, show_default=False)
    ] = None,
    media: Annotated[
        Path | None,
        typer.Option(help="Folder whose files requests may name (file://); default: none.", metavar="FOLDER", show_default=False),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="Host from which media may be fetched; may be repeated; default: none.", metavar="HOST", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command of vLLM and end.")] = False,
) -> None:
    """Serve a model with vLLM. Further arguments are passed to vLLM: eagle serve FOLDER --tensor-parallel-size 2."""
    from eagle_train.config import ConfigError
    from eagle_train.runs.serve import check_vllm, server_command, server_options

    options = server_options(folder, max_tokens=max_tokens, domains=domain or ())
    options |= {"host": host, "port": port}
    if media is not None:
        if not media.is_dir():
            raise ConfigError(f"--media {media}: there is no such folder")
        options["allowed-local-media-path"] = str(media.resolve())
    command = server_command(folder, options, context.args)
    if dry_run:
        print(shlex.join(command))
        return
    check_vllm()
    # vLLM sends usage statistics unless this is set.
    os.execve(command[0], command, {"VLLM_NO_USAGE_STATS": "1", **os.environ})
