"""Plans on disk: one process of a host makes a plan, and all of them map it (`data.shared`).

A file's name covers all that its content follows from, so that a plan of other facts, another stage, seed or version is never read. Plans
of a strategy that a program registered itself are not kept: its name doesn't say what it does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from eagle_model.visual import VisualPlans, VisualSpec
from eagle_sampling.budget import STATUS, STRATEGIES
from eagle_train.config import Config, StageConfig
from eagle_train.data.facts import Facts
from eagle_train.data.keys import RowFormat
from eagle_train.data.shared import shared_arrays

from .costs import CostModel
from .visual import plan_visual

PLAN_VERSION = 1
"""Raised when a plan of the same facts, stage, seed and epoch becomes another one (tests/train/test_plan_golden.py)."""

_VISUAL = tuple(field.name for field in fields(VisualPlans) if field.name not in ("max_tokens", "reasons", "result"))


def can_be_kept(facts: Facts, spec: VisualSpec) -> bool:
    """Whether names cover what plans follow from: facts that `prepare` made, and a strategy of this package."""
    return bool(facts.content) and STRATEGIES[spec.strategy].choose.__module__.startswith("eagle_sampling.")


def shared_visual(
    folder: Path | None, facts: Facts, max_tokens: int, spec: VisualSpec, *, share_media: bool, reserve: float = 0.0
) -> VisualPlans:
    """`plan_visual`, mapped from `folder`; made in this process with None."""

    def make() -> VisualPlans:
        return plan_visual(facts, max_tokens, spec, share_media=share_media, reserve=reserve)

    if folder is None:
        return make()
    path = visual_file(folder, facts, max_tokens, spec, share_media=share_media, reserve=reserve)
    arrays = shared_arrays(path, lambda: {name: getattr(plans, name) for plans in (make(),) for name in _VISUAL})
    return VisualPlans(max_tokens, STATUS, result=None, **arrays)


def visual_file(folder: Path, facts: Facts, max_tokens: int, spec: VisualSpec, *, share_media: bool, reserve: float = 0.0) -> Path:
    """Where the visual plans of all rows at a length are."""
    return folder / f"visual-{max_tokens}-{_key(facts, max_tokens, spec, share_media, reserve)}.plan"


def epoch_file(
    folder: Path,
    facts: Facts,
    stage: StageConfig,
    spec: VisualSpec,
    *,
    seed: int,
    epoch: int,
    share_media: bool,
    reserve: float = 0.0,
    costs: CostModel | None = None,
) -> Path:
    """Where the packs of an epoch of a stage are."""
    key = _key(facts, stage.model_dump_json(), spec, share_media, reserve, seed, epoch, costs)
    return folder / f"{stage.name}-epoch-{epoch}-{key}.plan"


def stage_files(
    folder: Path, facts: Facts, config: Config, stage: StageConfig, spec: VisualSpec, costs: CostModel | None, epochs: Iterable[int]
) -> set[Path]:
    """All files of a stage's plans: of media, and of these epochs. Nothing is planned for it."""
    share_media = config.packing.share_media
    options = {"share_media": share_media, "reserve": config.packing.reserve if share_media else 0.0}
    names = {visual_file(folder, facts, stage.max_tokens, spec, **options)}
    return names | {epoch_file(folder, facts, stage, spec, seed=config.run.seed, epoch=epoch, costs=costs, **options) for epoch in epochs}


def narrow(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """int64 arrays as int32 where that holds them: half of the disk and of the memory."""
    return {name: array.astype(np.int32) if array.max(initial=0) < 1 << 31 else array for name, array in arrays.items()}


def _key(facts: Facts, *rest: object) -> str:
    # Where the files are changes no plan: a run folder may be moved.
    sources = [source._replace(annotation=Path(), root=Path(), files=(), form=RowFormat()) for source in facts.sources]
    content = repr((PLAN_VERSION, facts.content, len(facts), sources, facts.frame_costs, *rest))
    return hashlib.blake2b(content.encode(), digest_size=10).hexdigest()
