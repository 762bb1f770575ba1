"""`eagle init`: write a configuration to start from."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("eagle.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Write the JSON Schema (for editors) instead.")] = False,
    vision: Annotated[
        str | None, typer.Option(help="Vision tower of a new model: folder or hub name.", metavar="SIGLIP", show_default=False)
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Its language model: folder, GGUF file or hub name.", metavar="MODEL", show_default=False)
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Write a small data set with its configuration instead; FILE is then a folder.")
    ] = False,
) -> None:
    """Write a commented configuration with every default.

    With --vision and --language, the first stage trains the connector alone. eagle init --example DIR writes a run that trains in seconds.
    """
    import json

    from eagle_train.config import Config, ConfigError

    from .template import commented_config

    if example:
        _write_example(path, force)
        return
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; --force replaces it")
    if (vision is None) != (language is None):
        raise ConfigError("--vision and --language belong together: a new model needs both")
    parts = [_seen_from(path.parent, name) for name in (vision, language)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(Config.json_schema(), indent=1) + "\n" if schema else commented_config(*parts), encoding="utf-8")
    print(f"wrote {path}" + ("" if schema else f"; next: {_to_fill_in(vision)}, then eagle plan {shlex.quote(str(path))}"))


def _to_fill_in(vision: str | None) -> str:
    """The keys that have no value which works everywhere."""
    if vision is not None:
        return "fill in data: a recipe, or sources in its place"
    return "set model.tokenizer (eagle tokenizer trains one) and data.recipe to your files"


def _write_example(folder: Path, force: bool) -> None:
    from eagle_train.config import ConfigError
    from eagle_train.quickstart.example import write_example

    if folder.exists() and not (folder.is_dir() and (force or not any(folder.iterdir()))):
        raise ConfigError(f"{folder} exists and is not an empty folder; name another one, or add --force to write into that folder")
    path = write_example(folder)
    named = shlex.quote(str(path))
    print(f"wrote {folder}; next: eagle plan {named}, eagle show {named}, eagle train {named}")


def _seen_from(folder: Path, name: str | None) -> str | None:
    """A path as a file in `folder` writes it: absolute paths and names on the hub stay as they are."""
    return os.path.relpath(name, folder) if name is not None and Path(name).exists() and not Path(name).is_absolute() else name
