"""From a command line to an exit code: a stored help page, or a verb and what its end means to a shell.

Exit codes are those of `eagle_train.errors`: an error class states its own in `exit_code`. Errors are one message without a traceback,
unless `--debug` is passed.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

from eagle_train.errors import INTERRUPTED, RUN_FAILED, TrainError, disk_is_full

from .pages import stored_page
from .progress import is_main_rank

COMPLETION = "_EAGLE_COMPLETE"
"""Set by the shell's completion script, which calls `eagle` for the words that may come next."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command line (default: that of the process) and exit with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    page = stored_page(given) if COMPLETION not in os.environ else None
    try:
        if page is not None:
            print(page, flush=True)
            sys.exit(0)
        run(given)
    except BrokenPipeError:  # the reader of the output has closed it (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(given: list[str]) -> NoReturn:
    """Run a verb and exit with its exit code."""
    from eagle_train.training.startup import note_beginning

    note_beginning()
    from .app import command
    from .gpu_settings import grow_segments, keep_kernels
    from .threads import sleep_while_waiting

    sleep_while_waiting()
    grow_segments()
    keep_kernels()
    debug = "--debug" in given
    try:
        command()(args=[argument for argument in given if argument != "--debug"], prog_name="eagle")
    except KeyboardInterrupt:
        interrupted(given)
    except SystemExit as end:
        if end.code != INTERRUPTED or hasattr(end, "reported"):  # the launcher's ranks have said what was saved
            raise
        interrupted(given)  # typer has made a code of the KeyboardInterrupt
    except BrokenPipeError:
        raise
    except BaseException as error:
        if hasattr(error, "signum"):  # eagle_train.training.stop.Interrupted, which a verb that trains nothing need not import
            stopped(error)
        if debug or not isinstance(error, Exception):
            raise
        report(error)
        if hasattr(error, "lost_rank"):
            leave_at_once(exit_code(error))
        sys.exit(exit_code(error))
    sys.exit(0)


def leave_at_once(code: int) -> NoReturn:
    """End a rank that lost another one without what an interpreter does at its end.

    Destructors of process groups wait for collectives that nobody finishes: with 4 and 8 ranks of gloo, after one was killed while a
    checkpoint was written, the main rank stayed until its launcher killed it after 30 s.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report(error: Exception) -> None:
    """Print an error once: the main rank prints what every rank raises, and another rank names itself for what is its own."""
    text = str(error) or type(error).__name__
    if (lost := getattr(error, "lost_rank", None)) is not None:  # of eagle_train.distributed.failure
        write_error_file(lost.message)
        if lost.reporter is None:
            print(f"error: {lost.message}", file=sys.stderr)
        return
    full = not isinstance(error, TrainError) and disk_is_full(error)
    if full:
        text = f"the disk is full, or a quota or a limit on file sizes is reached: {text}; free space and run the same command again"
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}; change its rights, or name another place (run.dir, data.facts, an output)"
    if not is_main_rank():
        write_error_file(f"rank {os.environ['RANK']}: {text}")
        if getattr(error, "on_every_rank", False):
            return
        text = f"rank {os.environ['RANK']}: {text}"
    else:
        write_error_file(text)
    print(f"error: {text}", file=sys.stderr)
    if not full and not expected(error):
        print("(this error has no message of its own in eagle; --debug shows where it comes from)", file=sys.stderr)


def write_error_file(text: str) -> None:
    """Write the message for torchrun's summary, in the file that torchrun names for this."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        import json
        import time

        message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def stopped(error: BaseException) -> NoReturn:
    """Print which state a signal left, and exit with 128 plus its number."""
    if is_main_rank() and str(error):
        print(f"\n{error}", file=sys.stderr)
    sys.exit(128 + error.signum)  # type: ignore[attr-defined]


def interrupted(given: list[str]) -> NoReturn:
    """Print what the same command would do again, and exit."""
    what = ""
    if given[:1] == ["train"]:
        what = "; nothing was trained yet"
    elif given[:1] == ["prepare"]:
        what = "; the same command measures no row again whose part of the facts is complete"
    elif given[:1] == ["curate"]:
        what = "; the same command continues: videos that are done and answers of the endpoint are kept"
    elif given[:2] == ["lmdb", "build"]:
        what = "; the same command continues with the images that are not in the LMDB yet"
    if is_main_rank():
        print(f"\ninterrupted{what}", file=sys.stderr)
    sys.exit(INTERRUPTED)


def exit_code(error: BaseException) -> int:
    """The code that the class of an error states; 1 for any other class."""
    return int(getattr(error, "exit_code", RUN_FAILED))


def expected(error: BaseException) -> bool:
    """Whether the message was written for users."""
    ours = type(error).__module__.split(".")[0].startswith("eagle_")
    return ours or isinstance(error, (ValueError, OSError, ImportError))
