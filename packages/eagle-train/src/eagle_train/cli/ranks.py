"""`python -m eagle_train.cli.ranks`: torchrun, with one readable end: what a rank reported is not repeated, and its exit code is kept."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    """Run torchrun with `arguments` (default: those of the process). Exits as the first rank that failed did."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun logs every process that it ends, and what it knows of their errors, which the ranks have printed.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(sys.argv[1:] if arguments is None else arguments))
    except ChildFailedError as error:
        text, code = ending(*cause(error))
        if text:
            print(text, file=sys.stderr)
        sys.exit(code)


def cause(error: Any) -> tuple[int, Any]:
    """Rank and failure that the others follow from: one that a signal ended, though not torchrun's own SIGTERM; else the first one.

    Ranks that lost a killed one may have ended by the time torchrun looks.
    """
    for rank, failure in error.failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return rank, failure
    return error.get_first_failure()


def ending(rank: int, failure: Any) -> tuple[str, int]:
    """What is left to say about the rank that failed first, and the exit code. A rank that exits has printed its error."""
    if failure.exitcode >= 0:
        return "", failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    why = "; the host may be out of memory (the system log has it)" if name == "SIGKILL" else ""
    return f"error: rank {rank} was ended by {name}{why}. The same command continues the run", 128 - failure.exitcode


if __name__ == "__main__":
    main()
