"""Reference pages made from the code while the documentation is built, so that they are never out of date (a hook of mkdocs).

`reference/configuration.md` comes from the pydantic schema of eagle-train, `reference/commands.md` from its typer application. Neither
imports torch. `python docs/generate.py FOLDER` writes both pages to a folder.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

CONFIGURATION, COMMANDS = "reference/configuration.md", "reference/commands.md"


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs with the pages that it found: adds the generated ones."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Path below docs/ and Markdown of every generated page."""
    return {CONFIGURATION: configuration_page(), COMMANDS: commands_page()}


# ---- configuration ------------------------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """One section of the page per section of the file, one row per key."""
    from eagle_train.config import Config

    lines = [
        "# Configuration",
        "",
        "A run is one YAML file. `eagle init FILE` writes one with every key, its default and its description;",
        "`eagle init --schema FILE` writes the JSON Schema for editors. Unknown keys are errors that name the nearest right key.",
        "Relative paths start from the folder of the file. `--set a.b=c` changes one value on the command line; a list is indexed",
        "by number or by the name of its items:",
        "`--set stages.64k.lr=1e-5`.",
        "",
        "Numbers of tokens may be written with a unit (`32K` is 32768), numbers of bytes too (`512MiB`, `2GB`).",
        "",
        "A run is resumed with the settings that it began with. Keys and sections that may change then are marked *free on resume*.",
        "",
        "This page is generated from `eagle_train.config`.",
    ]
    for name, field in Config.model_fields.items():
        lines += ["", f"## `{name}`", "", _meaning(field)]
        models = list(_models(field.annotation))
        if models:
            lines += ["", *_table(models[0], indexed(name, field))]
        for model, prefix, about in _nested(models, indexed(name, field)):
            lines += ["", f"### `{prefix}`", "", about, "", *_table(model, prefix)]
    return "\n".join(lines) + "\n"


def indexed(name: str, field: FieldInfo) -> str:
    """`stages.<i>` for a list of sections, `data.sources.<name>` for a mapping of them, else the name."""
    origin = typing.get_origin(_without_none(field.annotation))
    has_models = any(True for _ in _models(field.annotation))
    return name + (".<i>" if origin is list and has_models else ".<name>" if origin is dict and has_models else "")


def _nested(models: list[type[BaseModel]], prefix: str) -> Iterator[tuple[type[BaseModel], str, str]]:
    """(section, its path, its description) of sections inside sections, each once."""
    seen = set()
    for model in models:
        for name, field in model.model_fields.items():
            for inner in _models(field.annotation):
                path = f"{prefix}.{indexed(name, field)}"
                if inner not in seen:
                    seen.add(inner)
                    yield inner, path, field.description or ""
                yield from _nested([inner], path)


def _table(model: type[BaseModel], prefix: str) -> list[str]:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if any(True for _ in _models(field.annotation)) and not _is_mixed(field.annotation):
            kind, default = f"see `{prefix}.{indexed(name, field)}`", ""
        else:
            kind, default = _kind(field), _default(field)
        lines.append(f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(_meaning(field))} |")
    return lines


def _meaning(field: FieldInfo) -> str:
    """The description, and whether the field may change when a run is resumed."""
    extra = field.json_schema_extra
    free = isinstance(extra, dict) and extra.get("resume") == "free"
    return " ".join((field.description or "").split()) + (" *Free on resume.*" if free else "")


def _cell(text: str) -> str:
    # A '<' outside of code would start an HTML tag.
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part.replace("<", "&lt;") if index % 2 == 0 else part for index, part in enumerate(parts))


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """Sections inside an annotation: the model itself, of a list, of a mapping, or optional."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in typing.get_args(kind):
        yield from _models(part)


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        return parts[0] if len(parts) == 1 else kind
    return kind


def _is_mixed(kind: Any) -> bool:
    """Whether a value may be a section or something else."""
    kind = _without_none(kind)
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _kind(field: FieldInfo) -> str:
    """Type and allowed values in words."""
    bounds = []
    for item in field.metadata:
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if getattr(item, name, None) is not None:
                bounds.append(f"{sign} {getattr(item, name):_}".replace("_", " "))
    text = _words(field.annotation)
    return text + (f", {' and '.join(bounds)}" if bounds else "")


def _words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if set(arguments) == {Path, str}:
            return "path or address"
        return " or ".join("null" if part is type(None) else _words(part) for part in arguments)
    if origin is typing.Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        return "list of " + _words(arguments[0]).removeprefix("one of ") if arguments else "list"
    if origin is dict:
        return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "mapping"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "any value"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


# ---- commands -----------------------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """The help page of every verb, as the installed typer renders it."""
    from eagle_train.cli.app import command

    app = command()
    lines = [
        "# Commands",
        "",
        "`eagle VERB --help` prints these pages. Errors are one message without a traceback; `--debug` adds the traceback.",
        "On several GPUs or machines `torchrun ... -m eagle_train.cli VERB ...` starts the same program on every rank.",
        "",
        "| exit code | meaning |",
        "|---|---|",
        *(f"| {code} | {meaning} |" for code, meaning in exit_codes().items()),
        "",
        "This page is generated from `eagle_train.cli`.",
    ]
    for verb in verbs():
        lines += ["", f"## eagle {verb}".rstrip(), "", "```text", help_of(app, verb), "```"]
    return "\n".join(lines) + "\n"


def exit_codes() -> dict[int, str]:
    """Exit code and meaning, from the docstring of `eagle_train.errors`."""
    from eagle_train import errors

    text = " ".join((errors.__doc__ or "").partition("Exit codes:")[2].split())
    return {int(code): meaning for code, meaning in re.findall(r"(\d+) (.+?)(?:; |\.$)", text)}


def verbs() -> list[str]:
    """Names of all verbs, groups followed by their own verbs."""
    from eagle_train.cli import pages

    return pages.verbs()


def help_of(app: Any, verb: str) -> str:
    """What `eagle VERB --help` prints on a terminal of 100 columns."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [*verb.split(), "--help"], prog_name="eagle", env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    if result.exit_code:
        raise RuntimeError(f"eagle {verb} --help ended with exit code {result.exit_code}: {result.output}")
    return result.output.strip("\n")


if __name__ == "__main__":
    for page, text in pages().items():
        target = Path(sys.argv[1]) / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(f"wrote {target}")
