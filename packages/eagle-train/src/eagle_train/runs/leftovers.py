"""Facts, tables and plans that no run needs any more, and their removal.

A run needs the facts of its sources as they are configured, with the rows as they are now, and the table and plans that follow from them.
What it needs is found by the names that it would look for. The runs are that of the configuration, those in the same `run.dir` that use
the same facts, those that left a record there when they prepared (`data.users`), and those in folders that the caller names.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from eagle_train.config import Config, load_config
from eagle_train.data.errors import PrepareError
from eagle_train.data.join import joined_file
from eagle_train.data.lock import locked
from eagle_train.data.parts import ledger_of
from eagle_train.data.prepare import load_facts
from eagle_train.data.recipe import recipe_of
from eagle_train.data.source_plan import source_plans
from eagle_train.data.sources.index import index_path
from eagle_train.data.users import recorded_users
from eagle_train.errors import TrainError, describe
from eagle_train.planning.stored import stage_files
from eagle_train.planning.visual import visual_spec
from eagle_train.training.model import load_run_tokenizer
from eagle_train.training.sizes import model_sizes, stage_costs

from .folder import open_run
from .ready import has_evaluation

EPOCH = re.compile(r"-epoch-(\d+)-")
DAY = 86400.0
OTHER_SETTINGS, CHANGED_ROWS = FACTS = ("facts of other settings", "facts of rows that changed")


class CleanError(TrainError, ValueError):
    """Nothing is removed: what a run needs can't be told."""

    exit_code = 2


@dataclass(frozen=True)
class Leftover:
    """Files of one kind that no known run needs. folder: where they are. used: when one of them was last read or written, in seconds since
    1970, as the file system records it."""

    folder: Path
    what: str
    files: tuple[Path, ...]
    bytes: int
    used: float


@dataclass
class Needed:
    """files, and folders with all that is in them."""

    files: set[Path] = field(default_factory=set)
    folders: set[Path] = field(default_factory=set)

    def add(self, other: Needed) -> None:
        self.files |= other.files
        self.folders |= other.folders


def leftovers(config: Config, runs: Sequence[Path] = (), *, days: float) -> list[Leftover]:
    """What is in the configuration's folder of facts, was not used for `days` days, and is needed by no run that is known.

    runs: folders of further runs. Raises CleanError when a run exists and what it needs can't be told.
    """
    needed, limit = needed_by(config), time.time() - days * DAY
    for user, folder in _users(config, runs):
        needed.add(_needed_by_run(user, folder))
    return list(_found(_real(config.facts_folder), needed, limit))


def needed_by(config: Config) -> Needed:
    """What a run looks for in its folder of facts."""
    tokenizer = load_run_tokenizer(config)
    needed = Needed()
    for evaluation in (False, True) if has_evaluation(config) else (False,):
        plans = source_plans(config, recipe_of(config, evaluation=evaluation), tokenizer)
        done = [plan.done() for plan in plans]
        for plan, one in zip(plans, done, strict=True):
            needed.files |= {index_path(file.path, config.data.shard_rows, config.facts_folder / "index") for file in plan.files}
            if one is None:  # it is continued where it stopped
                needed.folders.add(plan.folder)
                continue
            parts = [plan.folder / name for name, *_ in one["parts"]]
            needed.files |= {plan.done_file, *parts, *map(ledger_of, parts)}
        if None in done:
            continue
        table = joined_file(config, [plan.prepared(one) for plan, one in zip(plans, done, strict=True) if one is not None])
        needed.files.add(table)
        if not evaluation and table.is_file():
            needed.files |= _plans(config, tokenizer)
    return needed


def remove(found: Iterable[Leftover]) -> int:
    """Remove them; returns the bytes. Raises PrepareError for a source that another process prepares now: the others before it are gone."""
    size = 0
    for one in found:
        if one.what in FACTS:
            with locked(one.folder, partial(_busy, one.folder)):
                _unlink(one.files)
                if not _facts_in(one.folder):
                    shutil.rmtree(one.folder)
        else:
            _unlink(one.files)
        size += one.bytes
    return size


def _plans(config: Config, tokenizer: object) -> set[Path]:
    folder, facts, sizes = config.facts_folder / "plans", load_facts(config, tokenizer), model_sizes(config, tokenizer)
    epochs = {int(found[1]) for path in folder.glob("*.plan") if (found := EPOCH.search(path.name))}
    spec = visual_spec(config, sizes)
    costs = ((stage, stage_costs(config, stage, sizes, tokenizer)) for stage in config.stages)
    return {path for stage, cost in costs for path in stage_files(folder, facts, config, stage, spec, cost, epochs)}


def _users(config: Config, runs: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Configuration and folder of the other runs that use these facts."""
    facts = config.facts_folder.resolve()
    for path in recorded_users(facts):
        run = load_config(path).run.folder
        if run.is_dir() or not run.parent.is_dir():  # on another host, or on a disk that is not there now
            yield path, run
    for folder in runs:
        open_run(folder)  # raises what is wrong with it
        yield folder / "config.yaml", folder
    for path in sorted(config.run.dir.glob("*/config.yaml")):
        if _may_use(path, facts):
            yield path, path.parent


def _may_use(path: Path, facts: Path) -> bool:
    try:
        return load_config(path).facts_folder.resolve() == facts
    except (TrainError, OSError, ValueError):
        return True


def _needed_by_run(path: Path, folder: Path) -> Needed:
    """As the run was started, and as its folder is opened, whose tokenizer and paths may be other ones."""
    needed, problems = Needed(), []
    ways = [partial(load_config, path), *([partial(open_run, folder)] if (folder / "config.yaml").is_file() else [])]
    for way in ways:
        try:
            needed.add(needed_by(way()))
        except Exception as error:
            problems.append(error)
    if len(problems) == len(ways):
        raise CleanError(
            f"nothing is removed: what the run in {folder} needs can't be told ({describe(problems[0])}); make its configuration and its "
            f"annotation files readable, or remove that folder and {path}, if nobody needs the run"
        ) from problems[0]
    return needed


def _found(facts: Path, needed: Needed, limit: float) -> Iterator[Leftover]:
    files, folders = {_real(path) for path in needed.files}, {_real(path) for path in needed.folders}
    for folder in sorted(path for path in facts.glob("*-*") if path.is_dir() and path not in folders):
        there = _facts_in(folder)
        if there & files:
            yield from _old(folder, CHANGED_ROWS, there - files, limit)
        else:
            yield from _old(folder, OTHER_SETTINGS, there, limit, whole=True)
    kinds = {"joined": ("tables", "*.arrow"), "plans": ("plans", "*.plan"), "index": ("indices of rows", "*.json")}
    for name, (what, pattern) in kinds.items():
        yield from _old(facts / name, what, set((facts / name).glob(pattern)) - files, limit)


def _facts_in(folder: Path) -> set[Path]:
    return {path for pattern in ("part-*", "done-*.json") for path in folder.glob(pattern)}


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _old(folder: Path, what: str, files: set[Path], limit: float, *, whole: bool = False) -> Iterator[Leftover]:
    """Those of the files that were not used since `limit`; with whole, all or none."""
    stats = {path: path.stat() for path in sorted(files)}
    used = {path: max(stat.st_mtime, stat.st_atime) for path, stat in stats.items()}
    old = [path for path, when in used.items() if when <= limit]
    if old and (not whole or len(old) == len(files)):
        size = sum(stats[path].st_size for path in old)
        yield Leftover(folder, what, tuple(old), size, max(used[path] for path in old))


def _busy(folder: Path, holder: str) -> PrepareError:
    return PrepareError(f"{folder} is being prepared by {holder}: wait for it, and run again")


def _unlink(files: Iterable[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
