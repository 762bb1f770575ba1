"""Datasets of the Hugging Face hub by name: the library `datasets` downloads them once, and their Arrow files are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from eagle_train.config import ConfigError, HubDataset

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def files_of(named: HubDataset) -> list[str]:
    """The Arrow files of a split in order, from the cache of `datasets` (HF_HOME), where it is downloaded to when it is not there.

    Raises ConfigError when `datasets` is not installed, and when the dataset, subset, split or revision can't be had.
    """
    try:
        import datasets
    except ImportError as error:
        install = "pip install 'eagle-train[remote]'"
        raise ConfigError(f"{named}: reading datasets of the hub by name needs the library datasets: {install}") from error
    try:
        table: Any = datasets.load_dataset(named.hub, named.subset, split=named.split, revision=named.revision)
    except Exception as error:  # of datasets, huggingface_hub, the network or the files; all say that it can't be had
        raise ConfigError(f"{named}: can't be loaded from the Hugging Face hub: {_why(error)}") from error
    files = [str(file["filename"]) for file in table.cache_files]
    if not files or getattr(table, "_indices", None) is not None:
        raise ConfigError(f"{named}: is not stored as whole Arrow files; save it with save_to_disk and name the folder")
    if (offline := _offline()) and named.revision is not None:
        # Without the hub, datasets takes whatever is in its cache; the folder is named after the commit.
        commit = Path(files[0]).parent.name
        if not (len(named.revision) >= 7 and commit.startswith(named.revision)):
            raise ConfigError(
                f"{named}: with {offline} set, revision {named.revision} can't be checked; the cache holds commit {commit}: write this as "
                f"revision, or unset {offline}"
            )
    return files


def _offline() -> str | None:
    """The variable that forbids the hub, if one is set."""
    return next((name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")), None)


def _why(error: Exception) -> str:
    """What happened and what to do, in one line; of an error of a request no more than its status."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = str(error).strip().splitlines() or [""]
    said = f"{type(error).__name__}: " + (f"the server answers {status}" if status is not None else lines[0][:300])
    if (offline := _offline()) is not None:
        cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
        return (
            f"{said}. {offline} is set, so that only what is in the cache of datasets ({cache}) can be read: unset it to download the "
            "dataset, or download it on another machine and copy the cache"
        )
    if status in (401, 403) or "gated" in said:
        return f"{said}; for a private or gated dataset set HF_TOKEN, or run hf auth login"
    return said
