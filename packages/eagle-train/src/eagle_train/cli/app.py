"""The command that verbs add themselves to."""

from typing import Annotated

import typer

from eagle_train import __version__

# Plain help: rich would cost a third of the time that --help may take.
app = typer.Typer(
    name="eagle",
    help="Train long-context vision-language models: eagle train quickstart shows it all in minutes. --debug shows tracebacks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"eagle-train {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)] = False):
    pass
