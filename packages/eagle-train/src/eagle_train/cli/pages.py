"""Help pages as typer renders them, stored: rendering one costs 0.3 s and more (typer 0.29 builds pydantic validators first), printing
a stored one 0.05 s. `store()` renders them anew; a test compares them with the options that exist.
"""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("help.txt")
VERBS = (
    *("", "chat", "data", "data lint", "data stats", "doctor", "eval", "export", "init", "lmdb", "lmdb build", "lmdb check"),
    *("plan", "prepare", "report", "serve", "show", "tokenizer", "train"),
)
_MARK = "=== eagle"


def stored_page(arguments: list[str]) -> str | None:
    """The page that a command line requests, or None when it requests something else (or no page is stored)."""
    if arguments[:2] == ["train", "quickstart"]:
        arguments = ["train", *arguments[2:]]
    if arguments and (arguments[-1] not in ("--help", "-h") or " ".join(arguments[:-1]) not in VERBS):
        return None
    try:
        text = FILE.read_text(encoding="utf-8")
    except OSError:
        return None
    verb = " ".join(arguments[:-1])
    _, found, rest = text.partition(f"{_MARK} {verb}".rstrip() + " ===\n")
    return rest.partition(f"{_MARK}")[0].strip("\n") if found else None


def rendered_page(verb: str) -> str:
    """The page as the installed typer renders it, for 80 columns."""
    from typer.testing import CliRunner

    from .app import command

    result = CliRunner().invoke(command(), [*verb.split(), "--help"], prog_name="eagle", env={"COLUMNS": "80"})
    return result.output.strip("\n")


def store() -> None:
    """Write all pages."""
    pages = [f"{_MARK} {verb}".rstrip() + f" ===\n{rendered_page(verb)}\n" for verb in VERBS]
    FILE.write_text("\n".join(pages), encoding="utf-8")
