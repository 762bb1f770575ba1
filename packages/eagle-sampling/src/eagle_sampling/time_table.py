"""Exact presentation times of a whole video in a few integers: runs of ticks on a straight line, rounded down.

A constant frame rate is one run, also when the container rounds its times to milliseconds (Matroska: 0, 33, 67, 100, ...), because
such ticks are `start + floor((i * step + phase) / den)` for some rational step. Whether such a step exists is decided exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Common frame rates, tried before the rate that the first and last tick suggest.
_RATES = tuple(Fraction(n, 1001) for n in (24000, 30000, 60000, 120000)) + tuple(
    Fraction(n) for n in (10, 12, 15, 24, 25, 30, 48, 50, 60, 120)
)


class Run(NamedTuple):
    """`length` ticks `start + (i * step + phase) // den` for i = 0 ... length - 1, with 0 <= phase < den."""

    start: int
    length: int
    step: int
    den: int
    phase: int


@dataclass(frozen=True)
class TimeTable:
    """Presentation times in order: `unit` seconds per tick (exact) and the runs of ticks. numpy and indexing see `times()`, in seconds."""

    unit: Fraction
    runs: tuple[Run, ...]

    @classmethod
    def from_ticks(cls, ticks: Iterable[int] | NDArray[np.integer], unit: Fraction) -> TimeTable:
        """Compress sorted integer ticks. Exact: `from_ticks(t, u).ticks()` is `t`.

        Raises ValueError when the ticks are not integers or not in order, or the unit is not positive.
        """
        if unit <= 0:
            raise ValueError(f"the unit of time must be positive, not {unit}")
        given = np.asarray(ticks if isinstance(ticks, np.ndarray) else list(ticks))
        if given.size and (given.ndim != 1 or given.dtype.kind not in "iu"):
            raise ValueError(f"ticks are {given.dtype} of shape {given.shape}: need a list of integers, in units of {unit} s")
        values = given.astype(np.int64, copy=False)
        deltas = np.diff(values)
        if len(deltas) and int(deltas.min()) < 0:
            raise ValueError("presentation times must be in order; sort them first")
        return cls(Fraction(unit), tuple(_compress(values, deltas, Fraction(unit))))

    def __len__(self) -> int:
        return sum(run.length for run in self.runs)

    def ticks(self) -> NDArray[np.int64]:
        """int64 [n], in units of `unit` seconds."""
        parts = [run.start + (np.arange(run.length, dtype=np.int64) * run.step + run.phase) // run.den for run in self.runs]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def times(self) -> NDArray[np.float64]:
        """float64 [n] seconds on the file's own timeline, each correctly rounded."""
        return self.ticks() * np.float64(self.unit.numerator) / np.float64(self.unit.denominator)

    def __getitem__(self, index: int | slice) -> Any:
        """`times()[index]`: seconds of one frame, or float64 of several."""
        return self.times()[index]

    def __iter__(self) -> Iterator[float]:
        return iter(self.times().tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.times().astype(np.float64 if dtype is None else dtype, copy=False)

    def to_list(self) -> list[int]:
        """Plain integers for JSON or Parquet: the unit as two, then five per run."""
        return [self.unit.numerator, self.unit.denominator, *(value for run in self.runs for value in run)]

    @classmethod
    def from_list(cls, values: Iterable[int]) -> TimeTable:
        """The inverse of `to_list`. Raises ValueError when `to_list` cannot have made the list."""
        given = list(values)
        try:
            numbers = [index(value) for value in given]
        except TypeError:
            raise ValueError(f"a time table is a list of integers, not {given[:8]}") from None
        if len(numbers) < 2 or (len(numbers) - 2) % 5 or numbers[0] <= 0 or numbers[1] <= 0:
            raise ValueError(f"a time table is 2 + 5 * runs integers, beginning with a positive unit; got {len(numbers)}: {numbers[:8]}")
        runs = tuple(Run(*numbers[i : i + 5]) for i in range(2, len(numbers), 5))
        for run in runs:
            if run.length < 1 or run.step < 0 or run.den < 1 or not 0 <= run.phase < run.den:
                raise ValueError(
                    f"a time table can't hold the run {run}: length and den must be positive, step not negative and 0 <= phase < den"
                )
        return cls(Fraction(numbers[0], numbers[1]), runs)

    @property
    def constant(self) -> bool:
        """True when all frames last equally long, up to the rounding of the container."""
        return len(self.runs) <= 1


def _compress(values: NDArray[np.int64], deltas: NDArray[np.int64], unit: Fraction) -> Iterator[Run]:
    if not len(values):
        return
    if not len(deltas):
        yield Run(int(values[0]), 1, 0, 1, 0)
        return
    if int(deltas.min()) == int(deltas.max()):
        yield Run(int(values[0]), len(values), int(deltas[0]), 1, 0)
        return
    # A gap or a cut between two rates ends a run; rounding moves a delta by one tick at most.
    middle = float(np.median(deltas))
    cuts = np.flatnonzero(np.abs(deltas - middle) > 1.0) + 1
    if len(cuts) > 64:  # variable: fitting each piece costs more than it saves
        yield from _equal_deltas(values, deltas)
        return
    for first, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(values)]):
        piece = values[first:stop]
        run = _fit(piece, unit)
        if run is not None:
            yield run
        else:
            yield from _equal_deltas(piece, np.diff(piece))


def _fit(piece: NDArray[np.int64], unit: Fraction) -> Run | None:
    """One run for all of `piece`, if one of the candidate steps gives it exactly."""
    n = len(piece)
    start = int(piece[0])
    if n == 1:
        return Run(start, 1, 0, 1, 0)
    offsets = piece - start
    mean = Fraction(int(offsets[-1]), n - 1)
    candidates = [1 / (rate * unit) for rate in _RATES]
    # |tick_i - i * step| < 1 bounds the step to within 1 / (n - 1) ticks of the mean; others are excluded before any array work.
    near = [step for step in candidates if abs(step - mean) * (n - 1) <= 1]
    near += [mean.limit_denominator(bound) for bound in (1, 10, 100, 1001, 10_000)]
    index = np.arange(n, dtype=np.int64)
    for step in dict.fromkeys(near):
        num, den = step.numerator, step.denominator
        if num * n > 1 << 62 or den * int(offsets[-1]) > 1 << 62:
            continue
        slack = den * offsets - num * index  # phase must satisfy slack <= phase < slack + den for every i
        low, high = int(slack.max()), int(slack.min()) + den - 1
        low = max(low, 0)
        if low <= min(high, den - 1):
            return Run(start, n, num, den, low)
    return None


def _equal_deltas(values: NDArray[np.int64], deltas: NDArray[np.int64]) -> Iterator[Run]:
    """Greedy runs of equal deltas; each begins at the frame after the end of the previous one."""
    n = len(values)
    if n == 1:
        yield Run(int(values[0]), 1, 0, 1, 0)
        return
    ends = np.append(np.flatnonzero(np.diff(deltas)) + 1, n - 1)  # last frame of each stretch of equal deltas
    first = 0
    for end in ends.tolist():
        if end < first:
            continue
        count = end - first + 1
        yield Run(int(values[first]), count, int(deltas[first]) if count > 1 else 0, 1, 0)
        first = end + 1
