"""Rows about one video: a step of seven as one tree, next to steps of one row, by this project and by public packages."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import Result, write
from benchmarks.rivals import Absent
from eagle_model import EagleForConditionalGeneration, PackedBatch

from . import rival
from .inputs import described, make, questions
from .measured import GIB, log, milliseconds, release

BRANCHES = 7
TREE, ONE_ROW = "tree", "one row"


class Arm(NamedTuple):
    """rows: of a step; kind: makes the model from a configuration; loss: of a model and a pack."""

    name: str
    contender: str
    rows: int
    kind: Callable[[Any], Any]
    loss: Callable[[Any, PackedBatch], Tensor]


def _ours(config: Any) -> Any:
    model = EagleForConditionalGeneration(config)
    model.set_activation_checkpointing("recompute")
    return model


def arms(small: bool, with_rival: bool) -> list[Arm]:
    """The tree is first, so that the others can be compared with it; what matters least is last, for a run that is cut."""

    def loss(model: Any, pack: PackedBatch) -> Tensor:
        return model(pack).loss

    own = [Arm(name, "ours", rows, _ours, loss) for name, rows in ((TREE, BRANCHES), (ONE_ROW, 1))]
    if not with_rival:
        return own
    name = rival.PLAIN_NAME if small else rival.NAME
    public = Arm(ONE_ROW, name, 1, partial(rival.make, plain=small), partial(rival.loss, plain=small))
    return [own[0], public, own[1]]


def shared_media(result: Result, tokens: int, rounds: int, out: Path | None, *, small: bool, with_rival: bool) -> None:
    """Every arm by itself on the device: model, a small step that compiles, `rounds` steps, and a case with the fastest one.

    An arm that fails is absent from the result and does not stop the others. The result is written after every arm.
    """
    config, device = described(small=small), "cpu" if small else "cuda"
    dtype = torch.float32 if small else torch.bfloat16
    tree_rate: float | None = None
    for arm in arms(small, with_rival):
        case = f"{BRANCHES} questions, {tokens} visual tokens, {arm.name}"
        try:
            metrics, details = _measured(arm, config, tokens, rounds, dtype, device)
        except Exception as error:
            log(f"{case}, {arm.contender}: {type(error).__name__}: {str(error)[:300]}")
            result.absent.append(Absent(case, arm.contender, f"{type(error).__name__}: {error}"[:200]))
        else:
            if arm.name == TREE:
                tree_rate = metrics["rows_per_s"]
            elif tree_rate is not None:
                metrics["tree_speedup"] = tree_rate / metrics["rows_per_s"]
            result.add(case, arm.contender, details=details, **metrics)
        release()
        if out is not None:
            write(result, out)


def _measured(arm: Arm, config: Any, tokens: int, rounds: int, dtype: torch.dtype, device: str) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, details) of an arm's steps, forward and backward."""
    model = make(config, dtype, arm.kind, device)
    losses: list[float] = []

    def step(pack: PackedBatch) -> None:
        loss = arm.loss(model, pack)
        loss.backward()
        losses.append(loss.item())
        model.zero_grad(set_to_none=True)

    step(questions(config, min(tokens // 2, 16 * config.tokens_per_tile), arm.rows, device=device))
    pack, times = questions(config, tokens, arm.rows, device=device), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        release()
        times.append(milliseconds(lambda: step(pack)))
        log(f"{arm.name}, {arm.contender}: {times[-1]:.0f} ms, loss {losses[-1]:.4f}")
    metrics = {"ms": min(times), "rows_per_s": arm.rows / min(times) * 1e3, "loss": losses[-1]}
    if device == "cuda":
        metrics["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return metrics, {"tokens": pack.input_ids.numel(), "rows": arm.rows, "all_ms": times}
