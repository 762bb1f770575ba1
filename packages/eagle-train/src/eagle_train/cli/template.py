"""A configuration file to start from: every section and key with its default and what it means, generated from the schema."""

from __future__ import annotations

import json
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from eagle_model.presets import PRESETS
from eagle_sampling.budget import STRATEGIES
from eagle_train.config import Config, StageConfig

WIDTH = 118
# Keys with names that are registered elsewhere.
_REGISTERED = {("sampling", "strategy"): STRATEGIES, ("model", "preset"): PRESETS}
# These keys are written; every other key is a comment with its default.
_STARTS = {("data", "recipe"): "recipe.yaml", ("run", "name"): "my-run"}
_PRESET = {("model", "preset"): "tiny", ("model", "tokenizer"): "tokenizer"}
_STAGES = (("32k", "32K"), ("64k", "64K"), ("128k", "128K"))
# The first stage of a model of two pretrained parts, as in the paper: the connector alone starts from random weights.
_WARMUP = {"train": "[connector]", "lr": "2.0e-4"}


def commented_config(vision: str | None = None, language: str | None = None) -> str:
    """YAML text: what must be filled in, and everything else as comments.

    vision, language: parts of a new model, whose first stage then trains the connector alone; default: a preset.
    """
    model = {("model", "vision"): vision, ("model", "language"): language} if vision is not None else _PRESET
    written: dict[tuple[str, str], Any] = {**_STARTS, **model}
    lines = [
        "## A run of eagle train. Lines with '##' explain; lines with '#' show a default: remove the '#' to change it.",
        "## eagle plan prints what this trains, before anything is trained. Paths are relative to this file.",
        "",
    ]
    for name, field in Config.model_fields.items():
        kind = field.annotation
        lines += _comment(field.description or "", "")
        lines.append(f"{name}:")
        if name == "stages":
            lines += _stages(warmup=vision is not None)
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            body = _section(kind, name, "  ", written)
            # A section that only has comments would be null, so its name is a comment too.
            if all(line.lstrip().startswith("#") for line in body):
                lines[-1] = f"# {name}:"
            lines += body
        else:
            lines[-1] = f"# {name}: {_text(field.get_default(call_default_factory=True))}"
        lines.append("")
    return "\n".join(lines)


def _stages(*, warmup: bool) -> list[str]:
    lines = []
    if warmup:
        lines += _comment("The connector alone: it is the only part that starts from random weights.", "  ")
        lines += ["  - name: warmup", "    max_tokens: 8K", *(f"    {key}: {value}" for key, value in _WARMUP.items())]
    for number, (name, tokens) in enumerate(_STAGES):
        lines += [f"  - name: {name}", f"    max_tokens: {tokens}"]
        if number == 0:
            lines += _section(StageConfig, "stages", "    ", {}, skip={"name", "max_tokens"})
    return lines


def _section(kind: type[BaseModel], path: str, indent: str, written: dict[tuple[str, str], Any], skip: set[str] | None = None) -> list[str]:
    lines: list[str] = []
    for name, field in kind.model_fields.items():
        if skip and name in skip:
            continue
        inner = field.annotation
        lines += _comment(field.description or "", indent)
        if allowed := allowed_values(path, name, inner):
            lines += _comment(allowed, indent)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines.append(f"{indent}# {name}:")
            lines += [
                f"{indent}# {line[len(indent) :]}" if not line.lstrip().startswith("#") else line
                for line in _section(inner, name, indent + "  ", {})
            ]
            continue
        key = (path, name)
        value = written.get(key, field.get_default(call_default_factory=True))
        lines.append(f"{indent}{'' if key in written else '# '}{name}: {_text(value)}")
    return lines


def allowed_values(section: str, key: str, annotation: Any) -> str:
    """The names that a value (or each item of a list, or the keys of a mapping) may have, as text; empty for any other kind of value."""
    if (section, key) in _REGISTERED:
        return f"one of: {', '.join(_REGISTERED[section, key])}"
    if get_origin(annotation) is Literal:
        return f"one of: {', '.join(map(str, get_args(annotation)))}"
    inner = next((found for kind in get_args(annotation) if (found := allowed_values("", "", kind))), "")
    if inner and get_origin(annotation) is list:
        return f"each {inner}"
    return inner.replace("one of", "keys") if inner and get_origin(annotation) is dict else inner


def _text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str) and value.replace("-", "").replace(".", "").replace("_", "").replace("/", "").isalnum():
        return value
    if isinstance(value, float):
        return yaml.safe_dump(value).split()[0]  # 2.0e-05: YAML reads 2e-05 as text
    return json.dumps(value)


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}## {line}" for line in textwrap.wrap(text, WIDTH - len(indent) - 3)]
