"""Evaluation with lmms-eval: its command, with the plugin of eagle-model, on a run or a model folder."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagle_train.config import ConfigError
from eagle_train.evaluation.evaluate import EvaluationError
from eagle_train.training.model import check_model_folder

#: Release of lmms-eval that the plugin was tested with.
TESTED = "0.7.3"


@contextmanager
def model_folder(folder: Path, out: Path, *, checkpoint: str | None = None, dtype: str = "bfloat16") -> Iterator[Path]:
    """The folder of a model to evaluate: `folder` itself, or, for a run, an export below `out` that is removed again.

    Raises ConfigError for another folder and for `checkpoint` with a model.
    """
    if not (folder / "config.yaml").is_file():
        check_model_folder(folder)
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint {checkpoint}: {folder} is the folder of a model; only a run has checkpoints")
        yield folder
        return
    from eagle_train.training.checkpoint import find_checkpoint

    from .export import export
    from .folder import open_run

    config = open_run(folder)
    path = find_checkpoint(config.run.folder / "checkpoints", checkpoint) if checkpoint is not None else None
    exported = out / "model"
    try:
        export(config, exported, checkpoint_path=path, dtype=dtype)
        yield exported
    finally:
        shutil.rmtree(exported, ignore_errors=True)


def lmms_command(
    model: Path,
    tasks: Sequence[str],
    out: Path,
    *,
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    limit: int | None = None,
    include: Path | None = None,
) -> list[str]:
    """The command line of lmms-eval.

    settings: of the plugin (device, max_frames, ...). generation: of `generate`. include: folder of tasks.
    Raises ConfigError for a path that lmms-eval's lists of `name=value` cannot hold.
    """
    if any(sign in str(model) for sign in ",="):
        raise ConfigError(f"{model}: lmms-eval takes no path with a comma or an equals sign; name the folder by another path")
    command = [sys.executable, "-m", "lmms_eval", "--model", "eagle", "--tasks", ",".join(tasks), "--batch_size", "1"]
    command += ["--model_args", pairs({"pretrained": model, **settings}), "--output_path", str(out), "--log_samples"]
    if pairs(generation):
        command += ["--gen_kwargs", pairs(generation)]
    if limit is not None:
        command += ["--limit", str(limit)]
    if include is not None:
        command += ["--include_path", str(include)]
    return command


def pairs(values: Mapping[str, Any]) -> str:
    """`name=value,name=value`, without those that are None."""
    return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)


def run_lmms(command: Sequence[str], out: Path) -> list[Path]:
    """Run lmms-eval; returns its files of results. Raises EvaluationError when it fails.

    lmms-eval ends with status 0 after an error, so that only its results say that it has evaluated.
    """
    done = subprocess.run(command, check=False)
    results = sorted(out.rglob("*results.json"))
    if done.returncode or not results:
        what = f"ended with status {done.returncode}" if done.returncode else "wrote no results"
        raise EvaluationError(f"lmms-eval {what}; its messages are above. The command was: {' '.join(command)}")
    return results


def check_lmms(tasks: Sequence[str]) -> None:
    """Raises ConfigError when lmms-eval is not installed, or no task is named."""
    if not tasks:
        raise ConfigError("--lmms names no task; for example --lmms videomme, or --lmms mmmu_val,docvqa_val")
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(f"lmms-eval is not installed; docs/serving.md says how to install it (tested with {TESTED})")
