"""The command `eagle`: parsing and printing only. Whatever a verb needs is imported when it runs, so that `--help` is instant."""

import os
import sys
from typing import NoReturn

from .pages import stored_page


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command line and exit with a code that says how it ended (see `eagle_train.cli.run`)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    page = stored_page(given)
    try:
        if page is not None:
            print(page, flush=True)
            sys.exit(0)
        from .run import main

        main(given)
    except BrokenPipeError:  # whoever read our output has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
