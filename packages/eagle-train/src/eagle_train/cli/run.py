"""The verbs by name, and what their end means to a shell.

Exit codes: 0 it worked; 1 the run failed; 2 the command line or the configuration is wrong; 3 the data: too many bad rows, damaged media,
or facts are missing; 4 an evaluation failed (after train: training is complete); 130 interrupted by SIGINT, 143 by
SIGTERM. Errors are one message without a traceback, unless `--debug` is given.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from . import answers, data, inspection, tokenizer, train  # noqa: F401  (they add their verbs)
from .app import app

RUN_FAILED, WRONG_USE, BAD_DATA, EVALUATION_FAILED, INTERRUPTED = 1, 2, 3, 4, 130


def main(given: list[str]) -> NoReturn:
    """Run a command line and exit with a code that says how it ended."""
    debug = "--debug" in given
    try:
        app(args=[argument for argument in given if argument != "--debug"], prog_name="eagle")
    except KeyboardInterrupt:
        interrupted(given)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        interrupted(given)  # typer has made a code of the KeyboardInterrupt
    except BrokenPipeError:
        raise
    except BaseException as error:
        if type(error).__name__ == "Interrupted":  # named, so that a command that trains nothing need not import it
            stopped(error)
        if debug or not isinstance(error, Exception):
            raise
        report(error)
        sys.exit(exit_code(error))
    sys.exit(0)


def is_main_rank() -> bool:
    """Whether this is the process that reports, of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def report(error: Exception) -> None:
    """Print an error once: ranks other than the main rank leave to it what every rank finds, and name themselves for what is theirs."""
    text = str(error) or type(error).__name__
    if not is_main_rank():
        write_error_file(f"rank {os.environ['RANK']}: {text}")
        if same_everywhere(error):
            return
        text = f"rank {os.environ['RANK']}: {text}"
    else:
        write_error_file(text)
    print(f"error: {text}", file=sys.stderr)
    if not expected(error):
        print("(this error has no message of its own in eagle; --debug shows where it comes from)", file=sys.stderr)


def same_everywhere(error: BaseException) -> bool:
    """Whether every rank raises this error, with the same message, so that the main rank's is enough."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ConfigError", "EvaluationError", "MainRankError"}) and "DeviceError" not in names


def write_error_file(text: str) -> None:
    """Give torchrun the message for the summary that it prints last, in the file that it names for this."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        import json
        import time

        message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def stopped(error: BaseException) -> NoReturn:
    """Say what a signal ended and what was saved, and exit."""
    if is_main_rank() and str(error):
        print(f"\n{error}", file=sys.stderr)
    sys.exit(128 + error.signum)  # type: ignore[attr-defined]


def interrupted(given: list[str]) -> NoReturn:
    """Say what became of the command, and exit."""
    what = ""
    if given[:1] == ["train"]:
        what = "; nothing was trained yet"
    elif given[:1] == ["prepare"]:
        what = "; the same command measures no row again whose part of the facts is complete"
    elif given[:2] == ["lmdb", "build"]:
        what = "; the same command continues with the images that are not in the LMDB yet"
    if is_main_rank():
        print(f"\ninterrupted{what}", file=sys.stderr)
    sys.exit(INTERRUPTED)


def exit_code(error: BaseException) -> int:
    """The code for an error, from what kind of error it is."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ConfigError" in names:
        return WRONG_USE
    if names & {"PrepareError", "MediaError"}:
        return BAD_DATA
    if "EvaluationError" in names:
        return EVALUATION_FAILED
    return RUN_FAILED


def expected(error: BaseException) -> bool:
    """Whether the message was written for users."""
    ours = type(error).__module__.split(".")[0].startswith("eagle_")
    return ours or isinstance(error, (ValueError, OSError, ImportError))
