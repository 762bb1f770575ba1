"""Which runs use a folder of facts that several may share (`data.facts`): each leaves its configuration there when it prepares.

`eagle clean` asks these before it removes anything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from eagle_train.config import Config, dump_config

from .atomic import replacing

FOLDER = "runs"


def record_user(config: Config) -> None:
    """Write down that a run uses its folder of facts; not for facts in the run folder itself, which has its configuration."""
    folder, run = config.facts_folder.resolve(), config.run.folder.resolve()
    if folder.is_relative_to(run):
        return
    path = folder / FOLDER / f"{hashlib.blake2b(str(run).encode(), digest_size=10).hexdigest()}.yaml"
    content = dump_config(config).encode()
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def recorded_users(facts_folder: Path) -> list[Path]:
    """The configurations that `record_user` wrote."""
    return sorted((facts_folder / FOLDER).glob("*.yaml"))
