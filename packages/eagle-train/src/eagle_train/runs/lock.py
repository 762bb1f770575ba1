"""One trainer per run folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from eagle_train.config import ConfigError
from eagle_train.data import lock


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the folder, which is made if need be. Raises ConfigError when another process holds it, naming that process."""
    return lock.locked(
        folder,
        lambda holder: ConfigError(f"{folder} is being trained by {holder}: wait for it or stop it, or give this run another run.name"),
    )
