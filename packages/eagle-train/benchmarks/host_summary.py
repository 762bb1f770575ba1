"""What `host.py` found, as one page: how parts ended, the planner's two aims, steps, scaling over one GPU, the longest sequence, kills."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import Case, read
from benchmarks.tables import number

WITHIN, SLOWER, SCALING = 0.15, 0.03, 0.9
"""Aims: of a predicted time, of the chosen split over the fastest one, and of the rate per GPU over that of one GPU."""


def page(folder: Path, done: dict[str, dict[str, Any]]) -> str:
    """Markdown. done: how every part ended, by name."""
    found = {path.stem: read(path).cases for path in sorted(folder.glob("*.json")) if path.stem in done}
    sections = [
        ("Parts", ["part", "ended", "seconds"], [[name, part["ended"], number(part["seconds"])] for name, part in done.items()]),
        ("Attention: predicted against measured", ["pack", "largest error", "chosen over fastest", "aims"], list(_planner(found))),
        ("Steps", ["sequence", "split", "tokens/s per GPU", "MFU", "reserved GiB", "communication", "not hidden"], list(_steps(found))),
        ("Scaling at equal tokens per GPU", ["GPUs", "tokens/s per GPU", "over one GPU", "aim"], list(_scaling(found))),
        ("Kills", ["kill", "ended after s", "errors", "equal to the undisturbed run"], list(_kills(found))),
    ]
    lines = [line for title, head, rows in sections if rows for line in ("", f"## {title}", "", *_table(head, rows))]
    if tokens := done.get("longest", {}).get("tokens"):
        lines += ["", "## Longest sequence", "", f"{tokens} tokens train ({tokens >> 10}K); tried: {done['longest']['tried']}"]
    return "\n".join(["# A whole host", *lines]) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _planner(found: dict[str, list[Case]]) -> Iterator[list[str]]:
    for part, cases in found.items():
        for case in cases if part.startswith("attention") else ():
            if case.contender == "plan_context":
                error, over = case.metrics["largest_error"], case.metrics["choice_over_best"]
                met = abs(error) <= WITHIN and over <= 1 + SLOWER
                yield [case.case, f"{error:+.1%}", f"{over:.3f}", "met" if met else "missed"]


def _steps(found: dict[str, list[Case]]) -> Iterator[list[str]]:
    for part, cases in found.items():
        for case in cases if part.startswith("step") else ():
            names = ("tokens_per_s", "mfu", "reserved_gib", "comm_share", "comm_exposed")
            yield [case.case, case.contender, *(number(case.metrics.get(name)) for name in names)]


def _scaling(found: dict[str, list[Case]]) -> Iterator[list[str]]:
    rates: dict[int, float] = {}
    for part, cases in found.items():
        for case in cases if part.startswith("scaling") else ():
            if case.case.startswith(("one-32k", "data-32k")):
                rates[int(part.partition("-")[2])] = case.metrics["tokens_per_s"]
    alone = rates.get(1)
    for gpus, rate in sorted(rates.items()):
        share = None if alone is None else rate / alone
        yield [str(gpus), number(rate), number(share), "" if share is None else "met" if share >= SCALING else "missed"]


def _kills(found: dict[str, list[Case]]) -> Iterator[list[str]]:
    for case in found.get("kills", []):
        if "ended_s" in case.metrics:
            yield [case.case, number(case.metrics["ended_s"]), number(case.metrics["errors"]), ""]
        elif "records_equal" in case.metrics:
            same = case.metrics["records_equal"] == case.metrics["weights_equal"] == 1
            yield [case.case, "", "", "yes, bit for bit" if same else "no"]
