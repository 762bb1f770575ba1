"""`eagle tokenizer`: train a small tokenizer from text, for a model that starts from random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app


@app.command()
def tokenizer(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.", show_default=False)],
    texts: Annotated[
        list[Path],
        typer.Argument(metavar="TEXT", help="Text files; of .json and .jsonl files, every text in them is used.", show_default=False),
    ],
    size: Annotated[int, typer.Option(help="Largest number of tokens, Eagle's included.")] = 8192,
) -> None:
    """Train a tokenizer, for model.tokenizer of a preset."""
    from eagle_train.config import ConfigError

    for path in texts:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "there is no such file"
            raise ConfigError(f"{path}: {what}; name the files whose text the model will read")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; name another one")
    from eagle_model.tokenizer import train_tokenizer

    try:
        made = train_tokenizer((text for path in texts for text in _texts(path)), size)
    except ConfigError:  # of a file
        raise
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from error
    made.save_pretrained(folder)
    print(f"wrote {folder}: {len(made)} tokens; next: model.tokenizer: {folder}")


def _texts(path: Path) -> Iterator[str]:
    """The texts of a file. Raises ConfigError for a file that is not text, and, with the line, for JSON that can't be read."""
    from eagle_train.config import ConfigError

    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix not in (".json", ".jsonl"):
                yield from file
                return
            for number, line in enumerate([file.read()] if path.suffix == ".json" else file, 1):
                try:
                    yield from _strings(json.loads(line))
                except ValueError as error:
                    raise ConfigError(f"{path}:{number}: can't be read as JSON ({error}); repair the file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason}); name a text, JSON or JSONL file") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
