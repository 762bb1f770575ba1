"""Rivals: other implementations of the same computation, some from packages that may not be installed."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rival:
    """name: as in results; make: returns the callable, from the objects that `imports` names; imports: "module:attribute" each."""

    name: str
    make: Callable[..., Callable[..., Any]]
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Absent:
    """A contender that did not run in a case, and why."""

    case: str
    contender: str
    reason: str


def load(case: str, rivals: Iterable[Rival]) -> tuple[dict[str, Callable[..., Any]], list[Absent]]:
    """The callables of the rivals whose imports succeed, by name, and the others with the error.

    An import can fail in any way (a missing package, or one that does not fit the installed torch), so every exception counts.
    """
    found: dict[str, Callable[..., Any]] = {}
    absent = []
    for rival in rivals:
        try:
            found[rival.name] = rival.make(*(_imported(name) for name in rival.imports))
        except Exception as error:
            absent.append(Absent(case, rival.name, _reason(error)))
    return found, absent


def working(
    case: str, contenders: Mapping[str, Callable[..., Any]], trial: Callable[[Callable[..., Any]], object], *, required: str = "ours"
) -> tuple[dict[str, Callable[..., Any]], list[Absent]]:
    """The contenders for which `trial(contender)` succeeds, and the others with the error. An error of `required` is raised."""
    found: dict[str, Callable[..., Any]] = {}
    absent = []
    for name, function in contenders.items():
        try:
            trial(function)
        except Exception as error:
            if name == required:
                raise
            absent.append(Absent(case, name, _reason(error)))
        else:
            found[name] = function
    return found, absent


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    imported = importlib.import_module(module)
    return getattr(imported, attribute) if attribute else imported


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200] if first else ''}"
