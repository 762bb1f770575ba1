"""Files that are whole or not there, whatever ends the writer: an exception, a kill, a power loss."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing inside name the file: the system's own (a full disk, a quota) does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # else the error has a message of its own
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end. It is on the disk before it has the name: a few ms on an SSD."""
    # With the host's name: on a shared disk processes of two hosts may have the same number.
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """What a JSON file holds; None when it isn't there, or was damaged by something stronger than us."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
