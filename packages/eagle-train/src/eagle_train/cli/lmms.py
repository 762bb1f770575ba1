"""`eagle eval FOLDER --lmms TASKS`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def evaluate_with_lmms(
    folder: Path,
    tasks: str,
    *,
    include: Path | None,
    limit: int | None,
    max_new_tokens: int | None,
    frames: list[int],
    checkpoint: str | None,
    out: Path | None,
    device: str | None,
    others: Sequence[str],
) -> None:
    """Evaluate a run or a model with lmms-eval. others: options of the command line that do not go with it.

    Raises ConfigError for such options and what `check_lmms` and `model_folder` find, EvaluationError when lmms-eval fails.
    """
    import torch

    from eagle_train.config import ConfigError
    from eagle_train.runs.lmms import check_lmms, lmms_command, model_folder, run_lmms

    from .eval import evaluation_folder

    if others:
        raise ConfigError(f"{', '.join(others)} cannot be given with --lmms: tasks bring their own rows and metrics")
    if len(frames) > 1:
        raise ConfigError("--lmms evaluates with one number of frames: --frames 64")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--lmms runs in one process; for several GPUs: eagle export, then accelerate launch -m lmms_eval --model eagle ..."
        )
    names = [name for name in (part.strip() for part in tasks.split(",")) if name]
    check_lmms(names)
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include-path {include}: there is no such folder")
    is_run = (folder / "config.yaml").is_file()
    parent, prefix = (folder / "evaluations", "") if is_run else (Path("evaluations"), f"{folder.resolve().name}-")
    target = evaluation_folder(parent.absolute(), prefix, out)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "float32" if device == "cpu" else "bfloat16"
    with model_folder(folder, target, checkpoint=checkpoint, dtype=dtype) as model:
        command = lmms_command(
            model.absolute(),
            names,
            target,
            settings={"device": device, "max_frames": frames[0] if frames else None},
            generation={"max_new_tokens": max_new_tokens},
            limit=limit,
            include=include.absolute() if include is not None else None,
        )
        results = run_lmms(command, target)
    for path in results:
        print(f"scores: {path}")
    for path in sorted(target.rglob("*samples_*.jsonl")):
        print(f"answers: {path}")
