"""`eagle init`: write a configuration to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("eagle.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Write the JSON Schema (for editors) instead.")] = False,
) -> None:
    """Write a commented configuration with every default."""
    import json

    from eagle_train.config import Config, ConfigError

    from .template import commented_config

    if path.exists() and not force:
        raise ConfigError(f"{path} exists; --force replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(Config.json_schema(), indent=1) + "\n" if schema else commented_config(), encoding="utf-8")
    print(f"wrote {path}" + ("" if schema else f"; next: fill in model and data, then eagle plan {path}"))
