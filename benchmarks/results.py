"""The JSON format of benchmark results (README.md describes it): dataclasses, writer, and a reader that validates."""

import argparse
import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.environment import Environment
from benchmarks.rivals import Absent

SCHEMA = 1


class ResultError(ValueError):
    """A file is not a benchmark result of this schema, or a result contradicts itself."""


@dataclass(frozen=True)
class Metric:
    """unit: as printed, such as "ms"; better: the direction of an improvement, "none" for figures that only describe a case."""

    unit: str
    better: Literal["lower", "higher", "none"]


@dataclass(frozen=True)
class Case:
    """One contender in one case. metrics: figures by the names that the result declares; details: anything else that JSON can hold."""

    case: str
    contender: str
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """One run of a benchmark. benchmark: "package/script"; ceilings: what the machine gave in this run; settings: the command's options."""

    benchmark: str
    environment: Environment
    metrics: dict[str, Metric]
    cases: list[Case] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def add(self, case: str, contender: str = "ours", details: dict[str, Any] | None = None, **metrics: float) -> Case:
        """Append a case and return it."""
        self.cases.append(Case(case, contender, {name: float(value) for name, value in metrics.items()}, details or {}))
        return self.cases[-1]


def validate(result: Result) -> None:
    """Raises ResultError for an undeclared metric, a figure that is not finite, a case without figures, or a case and contender twice."""
    seen = set()
    for case in result.cases:
        place = f"{result.benchmark}: case {case.case!r}, contender {case.contender!r}"
        if (case.case, case.contender) in seen:
            raise ResultError(f"{place}: occurs twice; give the cases different names")
        seen.add((case.case, case.contender))
        if not case.metrics:
            raise ResultError(f"{place}: has no metrics")
        for name, value in case.metrics.items():
            if name not in result.metrics:
                raise ResultError(f"{place}: metric {name!r} is not declared; declared are {', '.join(result.metrics)}")
            if not math.isfinite(value):
                raise ResultError(f"{place}: {name} is {value}, expected a finite number")


def write(result: Result, path: Path) -> None:
    """Validate and write as JSON. Raises ResultError, and OSError where the file cannot be written."""
    validate(result)
    path.write_text(json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Result:
    """Read and validate a file that `write` wrote. Raises ResultError with the file, the place in it, and what is expected."""
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: cannot be read as JSON: {error}") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise ResultError(
            f"{path}: schema is {schema!r}, expected {SCHEMA}; results of 2026-11-22 and older have no schema and cannot be compared: "
            "run the benchmark again"
        )
    try:
        result = _parsed(Result, values, "")
        validate(result)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from error
    return result


def _parsed(expected: Any, value: Any, place: str) -> Any:
    """`value` from JSON as the annotated type `expected`. Raises ResultError with the place of the first value that does not fit."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        known = typing.get_type_hints(expected)
        required = {f.name for f in dataclasses.fields(expected) if f.default is f.default_factory is dataclasses.MISSING}
        if not isinstance(value, dict) or not required <= set(value) <= set(known):
            found = sorted(value) if isinstance(value, dict) else value
            raise ResultError(f"{place or 'top level'}: found {found!r}, expected the entries {', '.join(known)}")
        return typing.cast(Any, expected)(
            **{name: _parsed(known[name], item, f"{place}.{name}".lstrip(".")) for name, item in value.items()}
        )
    if origin is list and isinstance(value, list):
        return [_parsed(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _parsed(arguments[1], item, f"{place}.{name}") for name, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _parsed(next(kind for kind in arguments if kind is not type(None)), value, place)
    if expected is Any:
        return value
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if expected in (int, str) and isinstance(value, expected) and not isinstance(value, bool):
        return value
    raise ResultError(f"{place}: found {value!r}, expected {arguments if origin is Literal else getattr(expected, '__name__', expected)}")


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument("--out", type=_json_path, metavar="FILE.json", help="write the result here, and its table next to it as FILE.md")


def _json_path(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .json")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return path


def report(result: Result, out: Path | None) -> None:
    """Print the table of a result; with `out` also write the result and its table."""
    from benchmarks.tables import document

    text = document(result)
    print(text)
    if out is not None:
        write(result, out)
        out.with_suffix(".md").write_text(text)
