"""The run folder: which run it holds, and copies of what the run started from, so that it can be moved.

`config.yaml` is complete. `origin/` holds the tokenizer and, for a run that starts from pretrained weights, the model's config.json: with
them and a checkpoint of its own the run can be evaluated and exported wherever the folder is.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from eagle_train.config import Config, ConfigError, dump_config, load_config
from eagle_train.config.load import free_keys, map_paths
from eagle_train.distributed.precision import auto_dtype
from eagle_train.training import checkpoint
from eagle_train.training.model import located, model_config

from .lock import locked

logger = logging.getLogger(__name__)


def claim_folder(config: Config, tokenizer: Any = None) -> None:
    """Write config.yaml and origin/, or check that the folder holds the same run; raises ConfigError naming what differs."""
    folder = config.run.folder
    path = folder / "config.yaml"
    if path.is_file() and checkpoint.latest(folder / "checkpoints") is not None:
        _check_same_run(load_config(path), config)  # complete: a setting that is newer than the run has its default
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        _keep_origin(config, tokenizer)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_config(config), encoding="utf-8")
    temporary.replace(path)


def _check_same_run(there: Config, config: Config) -> None:
    """Raises ConfigError, naming them, for settings that differ from those of the run in the folder and decide what is computed."""
    folder = config.run.folder
    mine = config.model_dump(mode="json")
    # A folder that was moved together with what is next to it still holds the same run.
    moved = set(_differences(_moved(there, folder).model_dump(mode="json"), mine))
    differing = sorted(name for name in _differences(there.model_dump(mode="json"), mine) if name in moved)
    grown = [name for name in differing if _may_grow(there, config, name)]
    refused = [name for name in differing if name not in grown]
    if refused:
        free = ", ".join(sorted({key for key in free_keys() if key not in ("run.name", "run.dir")}))
        raise ConfigError(
            f"{folder} holds a run with other settings ({', '.join(refused[:6])}{', ...' if len(refused) > 6 else ''}). To go on from its "
            f"weights: eagle export {folder} FOLDER, then another run.name with model.path: FOLDER. To start again: another run.name, or "
            f"remove that folder. A run that continues may change {free}, and steps of a stage that is not complete to a larger number"
        )
    for name in grown:
        logger.info("%s is larger than before; the learning rate follows the schedule of the longer stage from here", name)


def _may_grow(there: Config, config: Config, name: str) -> bool:
    """Whether a difference is a larger number of steps of a stage that is not complete: its optimizer's state still exists."""
    newest = checkpoint.latest(config.run.folder / "checkpoints")
    if newest is None:
        return False
    progress = checkpoint.read_progress(newest)
    for number, (before, now) in enumerate(zip(there.stages, config.stages)):
        if name == f"stages.{now.name}.steps" and before.steps is not None and now.steps is not None:
            return now.steps > before.steps and (number, False) >= (progress.stage, progress.done)
    return False


def open_run(folder: str | Path) -> Config:
    """The configuration of a run folder, wherever it is now; raises ConfigError when it is not one."""
    folder = Path(folder).resolve()
    path = folder / "config.yaml"
    if not path.is_file():
        what = "it holds the weights of a model" if (folder / "config.json").is_file() else "it has no config.yaml"
        raise ConfigError(f"{folder} is not a run folder: {what}; give the folder of a run of eagle train, for example runs/quickstart")
    config = _moved(load_config(path), folder, missing_only=True)
    model, origin = config.model, folder / "origin"
    if origin.is_dir():
        values: dict[str, Any] = {"tokenizer": str(origin)}
        if model.path is not None or model.vision is not None:
            values |= {"path": str(origin), "vision": None, "language": None, "image_size": None}
        model = model.replaced(**values)
    return config.replaced(run=config.run.replaced(dir=folder.parent, name=folder.name), model=model)


def remove_run(folder: Path) -> None:
    """Delete a run folder. Raises ConfigError when it holds something else, or is in use."""
    names = {path.name for path in folder.iterdir()}
    begun = names <= {"facts", "ledger.jsonl", ".lock"}  # and ended before it was claimed
    if not begun and not ("config.yaml" in names and names & {"origin", "checkpoints"}):
        raise ConfigError(f"{folder} is not removed: it holds no run of eagle train; give this run another run.name")
    with locked(folder):
        shutil.rmtree(folder)


def _moved(config: Config, folder: Path, *, missing_only: bool = False) -> Config:
    """A copy with paths relative to `folder` as they were to its run folder; with `missing_only` only paths that don't exist change."""
    before = config.run.folder

    def move(path: Path) -> Path:
        moved = Path(os.path.normpath(folder / os.path.relpath(path, before)))
        return path if missing_only and (path.exists() or not moved.exists()) else moved

    return map_paths(config, move)


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted names of the values that differ and may not change when a run is resumed."""
    if path in free_keys():
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        return [name for key in {**a, **b} for name in _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))]
    if path == "stages" and [stage["name"] for stage in a] == [stage["name"] for stage in b]:
        return [name for before, now in zip(a, b) for name in _differences(before, now, f"{path}.{now['name']}")]
    return [] if a == b else [path]


def _keep_origin(config: Config, tokenizer: Any) -> None:
    """Whole or not there: made under another name. It is small, and what an earlier start kept may be another tokenizer."""
    origin = config.run.folder / "origin"
    temporary = origin.with_name(".origin")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    if config.model.path is not None:
        shutil.copyfile(located(config, "path") / "config.json", temporary / "config.json")
    elif config.model.vision is not None:
        model_config(config, tokenizer).save_pretrained(temporary)
    shutil.rmtree(origin, ignore_errors=True)
    temporary.rename(origin)


def resolve_dtype(config: Config, device: str) -> Config:
    """The configuration with `parallel.dtype` resolved: that of the run in the folder, else `auto_dtype`.

    Call it before `start_world`. device: `cpu` or `cuda`.
    """
    if config.parallel.dtype != "auto":
        return config
    stored = config.run.folder / "config.yaml"
    dtype = "auto"
    if stored.is_file() and checkpoint.latest(config.run.folder / "checkpoints") is not None:
        dtype = load_config(stored).parallel.dtype
    dtype = auto_dtype(device) if dtype == "auto" else dtype
    return config.replaced(parallel=config.parallel.replaced(dtype=dtype))
