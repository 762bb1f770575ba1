"""Datasets of the Hugging Face hub by name: the library `datasets` downloads them once, and their Arrow files are read."""

from __future__ import annotations

import os
from typing import Any

from eagle_train.config import ConfigError, HubDataset

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def files_of(named: HubDataset) -> list[str]:
    """The Arrow files of a split in order, from the cache of `datasets` (HF_HOME), where it is downloaded to when it is not there.

    Raises ConfigError when `datasets` is not installed, and when the dataset, subset or split can't be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{named}: reading datasets of the hub by name needs the library datasets: pip install 'eagle-train[remote]'"
        ) from error
    try:
        table: Any = datasets.load_dataset(named.hub, named.subset, split=named.split, revision=named.revision)
    except Exception as error:  # of datasets, huggingface_hub, the network or the files; all say that it can't be had
        raise ConfigError(f"{named}: can't be loaded from the Hugging Face hub{_why(error)}") from error
    files = [str(file["filename"]) for file in table.cache_files]
    if not files or getattr(table, "_indices", None) is not None:
        raise ConfigError(f"{named}: is not stored as whole Arrow files; save it with save_to_disk and name the folder")
    return files


def _why(error: Exception) -> str:
    """What happened and what to do, in one line; an error of a request says no more than its status."""
    offline = next((name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")), None)
    if offline is not None:
        return (
            f": {offline} is set and it is not in the cache of datasets ({os.environ.get('HF_HOME', '~/.cache/huggingface')}); unset {offline} "
            "to download it, or download it on another machine and copy the cache"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = f"the server answers {status}" if status is not None else (str(error).strip().splitlines() or [""])[0][:300]
    hint = "; for a private or gated dataset set HF_TOKEN, or run hf auth login" if status in (401, 403) or "gated" in said else ""
    return f": {type(error).__name__}: {said}{hint}"
