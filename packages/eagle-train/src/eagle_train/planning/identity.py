"""Fingerprints of what a run is trained on: with other data a resume would be another run under the old one's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle_train.config import Config, ConfigError
from eagle_train.data.source_plan import tokenizer_fingerprint

from .stages import StageSchedule


def identify(config: Config, tokenizer: Any, schedules: Sequence[StageSchedule]) -> dict[str, str]:
    """The tokenizer, every source and every stage's steps and costs, as text that changes when they do. Where files are doesn't count."""
    result = {"the tokenizer": tokenizer_fingerprint(tokenizer)}
    for source in schedules[0].facts.sources:
        drawn = (source.fingerprint, source.rows, source.repeat_time, source.weight, source.max_dynamic_tiles)
        result[f"source {source.name}"] = hashlib.blake2b(json.dumps(drawn).encode(), digest_size=10).hexdigest()
    for schedule in schedules:
        result[f"the steps of stage {schedule.stage.name}"] = str(schedule.steps)
        result[f"the costs of stage {schedule.stage.name}"] = str(schedule.costs)  # which decide what is packed with what
    return result


def check_same(before: Mapping[str, str], now: Mapping[str, str], where: Path, *, open_stages: Sequence[str] = ()) -> None:
    """Raises ConfigError when a checkpoint with the fingerprints `before` would continue with other data; without any it is accepted.

    open_stages: stages that are not complete, whose number of steps may have grown.
    """
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)] if before else []
    grown = {f"the steps of stage {name}" for name in open_stages}
    differing = [name for name in differing if not (name in grown and int(now.get(name, 0)) > int(before.get(name, 0)))]
    if differing:
        raise ConfigError(
            f"{where}: was trained on other data ({', '.join(differing[:6])}): restore that data, give this run "
            "another run.name (model.path can start it from an export of the old one), or remove its folder (quickstart: --fresh)"
        )
