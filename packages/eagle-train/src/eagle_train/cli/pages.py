"""Help pages as typer renders them, stored: rendering one costs 0.3 s and more (typer 0.29 builds pydantic validators first), printing
a stored one 0.05 s. `store()` renders them anew; a test compares them with the options that exist.
"""

from __future__ import annotations

import re
from pathlib import Path

FILE = Path(__file__).with_name("help.txt")
_MARK = "=== eagle"
_ARGUMENT_TYPE = re.compile(r"^(  [A-Z]+) <[^>]+>(?= )", re.MULTILINE)
_OPTION_TYPE = re.compile(r"^(  --[a-z-]+ )<([^>]+)>(?= )", re.MULTILINE)
_TYPES = {"int": "N", "int range": "N", "str": "TEXT", "list[Path]": "PATH"}


def stored_page(arguments: list[str]) -> str | None:
    """The page that a command line requests, or None when it requests something else (or no page is stored)."""
    if arguments[:2] == ["train", "quickstart"]:
        arguments = ["train", *arguments[2:]]
    if arguments and arguments[-1] not in ("--help", "-h"):
        return None
    try:
        text = FILE.read_text(encoding="utf-8")
    except OSError:
        return None
    verb = " ".join(arguments[:-1])
    _, found, rest = text.partition(f"{_MARK} {verb}".rstrip() + " ===\n")
    return rest.partition(f"{_MARK}")[0].strip("\n") if found else None


def verbs() -> list[str]:
    """Names of all verbs, a group followed by its own verbs."""
    from typer.main import get_command

    from .app import command

    result = []
    for name, verb in get_command(command()).commands.items():  # type: ignore[attr-defined]
        result += [name, *(f"{name} {inner}" for inner in getattr(verb, "commands", {}))]
    return result


def rendered_page(verb: str) -> str:
    """The page as the installed typer renders it, for 80 columns."""
    from typer.testing import CliRunner

    from .app import command

    result = CliRunner().invoke(command(), [*verb.split(), "--help"], prog_name="eagle", env={"COLUMNS": "80"})
    # typer writes `{CONFIG}` for a required argument, which reads as characters to type, and Python's types after its name.
    page = re.sub(r"\{([A-Z]+)\}", r"\1", result.output.strip("\n"))
    page = _ARGUMENT_TYPE.sub(lambda found: found[1] + " " * (len(found[0]) - len(found[1])), page)
    return _OPTION_TYPE.sub(lambda found: (found[1] + _TYPES.get(found[2], found[2].upper())).ljust(len(found[0])), page)


def store() -> None:
    """Write all pages."""
    pages = [f"{_MARK} {verb}".rstrip() + f" ===\n{rendered_page(verb)}\n" for verb in ("", *sorted(verbs()))]
    FILE.write_text("\n".join(pages), encoding="utf-8")
