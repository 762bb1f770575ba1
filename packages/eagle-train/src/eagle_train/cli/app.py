"""The command that verbs add themselves to."""

from importlib import import_module
from typing import Annotated

import typer

from eagle_train import __version__

VERBS = (
    *("doctor", "init", "prepare", "data", "show", "plan", "train", "eval", "chat", "export", "serve", "report", "clean", "tokenizer"),
    *("lmdb", "curate", "needle"),
)
"""In the order of the help page."""

# Plain help: rich would cost a third of the time that --help may take.
app = typer.Typer(
    name="eagle",
    help="Train long-context vision-language models. Start with eagle train quickstart. --debug shows tracebacks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"eagle-train {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)] = False):
    pass


def command() -> typer.Typer:
    """The command with all its verbs, each in the file of its name."""
    for verb in VERBS:
        import_module(f".{verb}", __package__)
    return app
