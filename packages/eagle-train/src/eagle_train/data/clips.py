"""Bounds of a clip: the spellings that tools write, in a video's mapping, in its content part or next to it, as seconds.

Numbers, numbers as text (tables have no others) and clock times (`1:02.5`, `00:01:02.5`) are seconds. What has the name of a bound and is
not a known spelling (`start_frame`, `end_ms`) is refused where a video is: half of a clip would be another clip.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import RowError

_PREFIXES = ("", "video_", "clip_", "segment_")
_UNITS = ("", "_time", "_timestamp", "_sec", "_secs", "_second", "_seconds", "_s")


def _spellings(stems: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    snake = [f"{prefix}{stem}{unit}" for prefix in _PREFIXES for stem in stems for unit in _UNITS]
    camel = [re.sub(r"_(\w)", lambda match: match[1].upper(), name) for name in snake]
    return tuple(dict.fromkeys([*snake, *camel, *others]))


STARTS = _spellings(("start", "begin"), ("t_start",))
ENDS = _spellings(("end", "finish"), ("t_end",))
RANGES = ("clip", "segment", "clip_range", "time_range", "time_span", "video_segment")
"""Keys of a video's mapping or part that hold both bounds: [start, end], or a mapping with them. Next to a video they may be an answer."""

_CLOCK = re.compile(r"(?:(\d+):)?([0-5]?\d):([0-5]?\d(?:\.\d*)?)")
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*s?")
_BOUND_NAME = re.compile(
    r"(^|_)(start|begin|end|finish|onset|offset|range|span|interval|window|segment|clip|timestamps?|times?|ts|t[01]|bounds|from|to)(_|$)"
    r"|^(start|begin|end|finish)[A-Z]|^duration$"
)


RATES = ("fps", "sample_fps")
"""Keys of the rate at which a list of frames was taken."""


def clip_of(mapping: Mapping[str, Any], *, ranges: bool = False) -> dict[str, Any]:
    """Bounds of a clip and rate of frames that stand in a mapping next to the video. ranges: also RANGES."""
    names = (*STARTS, *ENDS, *(RANGES if ranges else ()), *RATES)
    return {key: mapping[key] for key in names if mapping.get(key) not in (None, "")}


def rate_of(about: Mapping[str, Any]) -> float | None:
    """The rate of a list of frames, None where it is not given; raises RowError for what isn't one, and for two values."""
    rates = {key: about[key] for key in RATES if about.get(key) is not None}
    numbers = {key: as_number(value) for key, value in rates.items()}
    for key, number in numbers.items():
        if number is None or not 0 < number <= 1000:
            raise RowError("bad-media", f"{key} is {rates[key]!r:.100}, expected a number from 0 (not included) to 1000")
    if len(set(numbers.values())) > 1:
        raise RowError(
            "bad-media", f"a video has several rates: {', '.join(f'{key} = {value}' for key, value in numbers.items())}; keep one"
        )
    return next(iter(numbers.values()), None)


def bounds(about: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Start and end of a clip in seconds, None where a bound is not given; raises RowError for two values of one, and for an empty clip."""
    found: dict[str, dict[str, float]] = {"start": {}, "end": {}}
    for which, key, value in _said(about):
        found[which][key] = seconds(key, value)
    for values in found.values():
        if len(set(values.values())) > 1:
            said = ", ".join(f"{name} = {value}" for name, value in values.items())
            raise RowError("bad-media", f"a video has several bounds: {said}; keep one")
    start, end = (next(iter(found[which].values()), None) for which in ("start", "end"))
    if start is not None and end is not None and end <= start:
        raise RowError("bad-media", f"video clip ends at {end} s, not after its start at {start} s")
    return start, end


def _said(about: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(start or end, key, value) of every bound."""
    for which, names in (("start", STARTS), ("end", ENDS)):
        yield from ((which, name, about[name]) for name in names if about.get(name) is not None)
    for name in RANGES:
        value = about.get(name)
        if value is None:
            continue
        if isinstance(value, Mapping) and value and set(value) <= {*STARTS, *ENDS}:
            yield from _said(value)
        elif isinstance(value, list) and len(value) == 2:
            yield from ((which, name, item) for which, item in zip(("start", "end"), value) if item is not None)
        else:
            raise RowError("bad-media", f"video {name} is {value!r:.100}, expected [start, end] in seconds")


def seconds(key: str, value: Any) -> float:
    """The bound as a number; raises RowError for what isn't a time from 0 on."""
    number = as_number(value)
    if number is None or not 0 <= number <= sys.float_info.max:
        raise RowError("bad-media", f"video {key} is {value!r:.100}, expected seconds from 0 on, or a clock time such as 00:01:02.5")
    return number


def as_number(value: Any) -> float | None:
    """A number, a number as text (also with `s`), or a clock time in seconds; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if abs(value) <= sys.float_info.max else None
    if not isinstance(value, str):
        return None
    text = value.strip()
    if match := _NUMBER.fullmatch(text):
        return float(match[1])
    if match := _CLOCK.fullmatch(text):
        return 3600 * int(match[1] or 0) + 60 * int(match[2]) + float(match[3])
    return None


def looks_like_a_bound(key: str, value: Any) -> bool:
    """Whether a key that nothing reads may be a bound of a clip: it has such a name, and a time or two as its value."""
    if _BOUND_NAME.search(key) is None:
        return False
    if isinstance(value, Mapping):
        return bool(value.keys() & {*STARTS, *ENDS})
    if isinstance(value, list):
        return len(value) == 2 and all(as_number(item) is not None for item in value)
    return as_number(value) is not None and key != "duration"
