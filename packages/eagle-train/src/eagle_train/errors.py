"""The base of the errors that eagle_train raises on purpose. Their messages are written for users; `exit_code` is that of the command.

Exit codes: 0 success; 1 the run failed; 2 the command line or the configuration is wrong; 3 the data: too many bad rows, damaged media, or
facts are missing; 4 an evaluation failed (after `train`: training is complete); 130 SIGINT; 143 SIGTERM.
"""

import errno
import re
import traceback
from pathlib import Path

RUN_FAILED, WRONG_USE, BAD_DATA, EVALUATION_FAILED, INTERRUPTED, TERMINATED = 1, 2, 3, 4, 130, 143


class TrainError(Exception):
    """The base class. on_every_rank: whether every rank raises it, with the same message, so that the main rank alone prints it."""

    exit_code = RUN_FAILED
    on_every_rank = False


class EvaluationError(TrainError, RuntimeError):
    """The model can't answer, on at least one rank; raised on every rank with the same message."""

    exit_code = EVALUATION_FAILED
    on_every_rank = True


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that it follows from, says that a disk is full, or a quota or a limit on file sizes is reached."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if _FULL_IN_TEXT.search(str(current)):
            return True
        current = current.__cause__ or current.__context__
    return False


_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
# Libraries written in Rust or C++ (safetensors, tokenizers, arrow) give the number or the text only.
_FULL_IN_TEXT = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b|No space left on device|Disk quota exceeded|File too large")


def describe(error: BaseException) -> str:
    """Kind and message of an error, and the last line of code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def counted(number: int, singular: str) -> str:
    """A number with its noun, for messages: `1 row`, `2 rows`."""
    return f"{number} {singular}" + ("" if number == 1 else "s")
