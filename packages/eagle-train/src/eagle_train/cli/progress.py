"""Progress of a verb: on a terminal one line that is rewritten, in a file a line every ten seconds."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


def is_main_rank() -> bool:
    """Whether this process is the main rank of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


class Printer:
    """Prints messages and the progress line; `silent` for ranks other than the main rank."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.moving = sys.stderr.isatty()
        self._open = False
        self._last = 0.0

    def message(self, text: str) -> None:
        """Print a message on a line of its own."""
        if self.silent:
            return
        self._close()
        print(text, flush=True)

    def record(self, record: dict[str, Any]) -> None:
        """Print a metrics record: a step replaces the progress line, an evaluation is a message."""
        from eagle_train.training.metrics import progress_line

        if self.silent:
            return
        if record["kind"] == "eval":
            scores = ", ".join(
                f"{name} {score['accuracy']:.3f} (text-only {score['text_only']:.3f})" for name, score in record["scores"].items()
            )
            self.message(f"{record['stage']}  after step {record['total_step']}: {scores}")
        elif record["kind"] == "eval_failed":
            self._close()  # the error itself is logged
        elif record["kind"] == "step":
            self.line(progress_line(record), last=record["step"] == record["steps"])

    def line(self, text: str, last: bool = False) -> None:
        """One line that replaces the one before on a terminal; elsewhere at most one line in ten seconds."""
        if self.silent:
            return
        if self.moving:
            sys.stderr.write("\r\x1b[2K" + text)
            sys.stderr.flush()
            self._open = True
            if last:
                self._close()
        elif last or time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._open:
            sys.stderr.write("\n")
            self._open = False

    def preparing(self) -> Any:
        """Progress of prepare: a context manager that yields its callback."""
        if self.silent:
            return nullcontext(None)
        self._close()
        from eagle_train.watching.progress import prepare_progress

        return prepare_progress()

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[..., None]]:
        """Progress of a count: a context manager that yields its callback, which takes what is done, the total, and what was done."""
        yield lambda done, total, how="": self.line(f"{done} of {total} {what} {how}".rstrip(), last=done == total)


class _Once(logging.Filter):
    """Passes a warning of a library once for each text; what eagle logs passes always."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("eagle_") or record.levelno >= logging.ERROR:
            return True
        text = record.getMessage()
        if text in self._seen:
            return False
        self._seen.add(text)
        return True


def quiet() -> None:
    """Log messages of eagle_train as plain lines, and warnings of libraries, each text once and on the main rank only."""
    logging.basicConfig(level=logging.WARNING if is_main_rank() else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("eagle_train").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_Once())
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    if not is_main_rank():
        warnings.simplefilter("ignore")
        os.environ.setdefault("TORCH_LOGS", "-all")  # errors only: torch's loggers have a handler of their own; read when torch is imported
    shown: set[str] = set()
    show = warnings.showwarning

    def once(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            show(message, category, *where, **options)

    warnings.showwarning = once
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; read when tqdm is imported
