"""Checkpoints that are complete or absent, also after a kill: written under another name, synced to disk, then renamed.

A checkpoint is a folder `<stage>-<step>` (`<stage>-end` at the end of a stage) with `state.json` and files of
`torch.distributed.checkpoint`: weights, their moving average, and the optimizer's state, unless the stage is over and the next one does not
carry it on. A folder with that name is complete; one that starts with `.writing-` is incomplete and is removed at the next start. Nothing
else is deleted, except by the keep rule, and only after the newer checkpoint is complete. Any number of ranks can read it, whatever number
wrote it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_train.errors import WRONG_USE, TrainError, disk_is_full

if TYPE_CHECKING:  # torch is imported where weights are written or read: what is saved can be said without it
    import torch
    from torch import nn

    from eagle_train.distributed.world import World

_WRITING = ".writing-"


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` optimizer steps of stage number `stage` are done, `total_steps` of the run.

    done: the stage is over. seen: counters that continue (tokens, tiles, samples). data: what it is trained on (`identity.identify`).
    """

    stage: int
    stage_name: str
    step: int
    total_steps: int
    done: bool
    seen: dict[str, int]
    data: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return f"{self.stage_name}-end" if self.done else f"{self.stage_name}-{self.step:08d}"


class CheckpointError(TrainError, ValueError):
    """A checkpoint that can't be read or does not fit the run."""


class UnknownCheckpointError(CheckpointError):
    """The name of a checkpoint that is not there."""

    exit_code = WRONG_USE


class WriteError(CheckpointError):
    """A checkpoint could not be written; raised on every rank with the same message."""

    on_every_rank = True


def write(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    world: World,
    *,
    average: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint under `folder`; every rank calls it. Returns its path, which exists only once everything in it is durable.

    Raises WriteError when it can't be written; the checkpoints before stay what they are.
    """
    import torch.distributed.checkpoint as dcp

    temporary = begin(folder, progress, world)
    try:
        dcp.save(state_of(model, optimizer, average), checkpoint_id=str(temporary), no_dist=world.size == 1)
    except dcp.api.CheckpointException as error:  # not an Exception; the same on every rank
        raise not_written(folder, progress, [why(folder, error)]) from error
    world.barrier()
    if world.is_main:
        publish(folder, progress)
    world.barrier()
    return folder / progress.name


def begin(folder: Path, progress: Progress, world: World) -> Path:
    """The empty folder that a checkpoint is written in before it gets its name; every rank calls it."""
    temporary = folder / f"{_WRITING}{progress.name}"

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    world.first(make)  # also on a full disk no rank waits for one that has failed
    return temporary


def publish(folder: Path, progress: Progress) -> None:
    """Give a checkpoint that all ranks have written its name, once everything in it is on disk; the main rank calls it."""
    temporary, final = folder / f"{_WRITING}{progress.name}", folder / progress.name
    (temporary / "state.json").write_text(json.dumps(asdict(progress), indent=1) + "\n", encoding="utf-8")
    for path in sorted(temporary.iterdir()):
        _sync(path)
    _sync(temporary)
    if final.exists():  # the same step again, after a resume from an earlier one: the old folder is whole and equal
        shutil.rmtree(temporary)
    else:
        os.rename(temporary, final)
        _sync(folder)


def discard(folder: Path, progress: Progress) -> None:
    """Remove what was written of a checkpoint that will not be complete."""
    shutil.rmtree(folder / f"{_WRITING}{progress.name}", ignore_errors=True)


def not_written(folder: Path, progress: Progress, reasons: Iterable[str]) -> WriteError:
    """The error of a checkpoint that could not be written, with what the run continues from; reasons: `why` of the ranks."""
    before = latest(folder)
    then = f"the same command continues from {before.name}" if before is not None else "the same command starts again"
    return WriteError(
        f"checkpoint {progress.name} could not be written to {folder}: {'; '.join(dict.fromkeys(reasons))}. Nothing of it is kept, and "
        f"older checkpoints are as they were: when there is space and the folder can be written, {then}"
    )


def why(folder: Path, error: BaseException) -> str:
    """Why a checkpoint could not be written under `folder`, as this rank sees it, with the room on a disk that is full."""
    failures = [failure[0] for failure in getattr(error, "failures", {}).values()] or [error]
    # torch reports a write that failed half way as "unexpected pos".
    if not any(disk_is_full(failure) or "unexpected pos" in str(failure) for failure in failures):
        return reasons(error)
    free = shutil.disk_usage(folder).free / 2**30
    return (
        f"{reasons(error)} (the disk is full, or a quota or a limit on file sizes is reached; {free:.1f} GiB of the disk are free: free "
        "space, for example by a smaller checkpoint.keep)"
    )


def read(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    world: World,
    *,
    average: Mapping[str, torch.Tensor] | None = None,
) -> Progress:
    """Load weights (and the optimizer's state, when given and there) from a checkpoint; every rank calls it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    progress = read_progress(path)
    with_optimizer = optimizer if not progress.done else None
    state = state_of(model, with_optimizer, average)  # tensors of the average are filled in place
    try:
        dcp.load(state, checkpoint_id=str(path), no_dist=world.size == 1, planner=_planner(with_optimizer))
    except dcp.api.CheckpointException as error:
        raise CheckpointError(
            f"{path}: can't be read, or does not fit this model: {reasons(error)}. If it is damaged, remove that folder: "
            "the run goes on from the checkpoint before"
        ) from error
    set_model_state_dict(model, state["model"])  # pyright: ignore[reportArgumentType]
    if with_optimizer is not None:
        set_optimizer_state_dict(model, with_optimizer, state["optimizer"])  # pyright: ignore[reportArgumentType]
    return progress


def carry_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Give an optimizer the state that another one had at the end of a stage, for the parameters that both train; every rank calls it.

    Learning rates and the other settings of its groups stay. Raises CheckpointError when the checkpoint holds no optimizer state.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    keys = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    state = _state(model, optimizer)["optimizer"]
    kept = {name for name in state["state"] if any(key.startswith(f"optimizer.state.{name}.") for key in keys)}
    if not kept:
        raise CheckpointError(
            f"{path}: holds no optimizer state for the parameters of the next stage, which carry_optimizer asks for; set it to false"
        )
    wanted = {"optimizer": {"state": {name: state["state"][name] for name in sorted(kept)}}}
    dcp.load(wanted, checkpoint_id=str(path), no_dist=world.size == 1, planner=_planner(optimizer))
    state["state"] |= wanted["optimizer"]["state"]
    set_optimizer_state_dict(model, optimizer, state)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in list(optimizer.state):
        if names[id(parameter)] not in kept:  # reading made a state of zeros after one step
            del optimizer.state[parameter]


def _planner(optimizer: torch.optim.Optimizer | None) -> Any:
    """What torch.distributed.checkpoint plans reading by: an optimizer may have its own (`load_planner`), for states that it keeps in a
    form of its own. Everything in the state must be in the checkpoint."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    own = getattr(optimizer, "load_planner", None)
    return own() if own is not None else DefaultLoadPlanner()


def _reason(error: BaseException) -> str:
    """The first line of what a library says; a file that was cut off may say nothing but its kind of error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "a file in it ends too early" if isinstance(error, EOFError) else type(error).__name__


def reasons(error: BaseException) -> str:
    """Why `torch.distributed.checkpoint` failed, each reason of a rank once."""
    failures = getattr(error, "failures", None)
    return "; ".join(dict.fromkeys(_reason(failure[0]) for failure in failures.values())) if failures else _reason(error)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None, average: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
    """What a checkpoint holds, as the tensors of this rank."""
    return _state(model, optimizer) | ({"average": dict(average)} if average else {})


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions()
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=options)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    return state


def read_progress(path: Path) -> Progress:
    """What `state.json` of a checkpoint says; raises CheckpointError when it isn't a checkpoint."""
    try:
        return Progress(**json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of a run ({error})") from error


def whole(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if not path.name.startswith(".") and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: ((progress := read_progress(path)).stage, progress.step, progress.done))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = whole(folder)
    return found[-1] if found else None


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint `name` (for example `warmup-end`) of a run's `folder` of checkpoints, or the one at the path `name`.

    Raises UnknownCheckpointError, naming those that exist, when there is none.
    """
    for path in (folder / name, Path(name)):
        if (path / "state.json").is_file():
            return path
    names = ", ".join(path.name for path in whole(folder)) or "none yet"
    raise UnknownCheckpointError(f"{name} is neither a checkpoint of the run nor the folder of one; {folder} holds: {names}")


def clean(folder: Path) -> None:
    """Remove what a killed writer left: folders that never got their name."""
    if folder.is_dir():
        for path in folder.glob(f"{_WRITING}*"):
            shutil.rmtree(path)


def keep_newest(folder: Path, stage: int, count: int) -> list[Path]:
    """The keep rule: of a stage's checkpoints keep the newest `count`, and its end always. Returns what was removed."""
    candidates = [path for path in whole(folder) if (progress := read_progress(path)).stage == stage and not progress.done]
    removed = candidates[:-count]
    for path in removed:
        # Renamed first, so that a kill in the middle of deleting leaves no folder that looks whole.
        doomed = path.with_name(f"{_WRITING}{path.name}.removed")
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    return removed


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
