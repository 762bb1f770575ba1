"""A folder of videos with needles, of rows about them, and of what was put where. The same settings give the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .cards import KINDS, OPTIONS, Needle
from .hosts import Host, NeedleError, find_hosts, host_frames

__all__ = ["KINDS", "NeedleError", "Settings", "build"]

INSTRUCTION = "Answer with the letter of the option."
TASK = """\
# lmms-eval task: cd to the folder above, then python -m lmms_eval --model eagle --tasks needle --include_path lmms_eval ...
task: needle
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visuals
doc_to_text: !function functions.question
doc_to_target: !function functions.answer
generation_kwargs: {max_new_tokens: 4, temperature: 0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}
metadata: [{version: 0}]
"""
FUNCTIONS = """\
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]


def visuals(doc):
    return [str(FOLDER / doc["video"])]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["conversations"][0]["value"].removeprefix("<video>")


def answer(doc):
    return doc["conversations"][1]["value"]
"""
"""The rows as a task of lmms-eval: accuracy of single rows, without the rule about rotations."""
GAP = 0.1
"""Time between two cards of a needle, as a share of the video."""


@dataclass(frozen=True)
class Settings:
    """What is built: `count` videos for every kind of needle, length (seconds) and depth (0: at the start, 1: at the end).

    rotations: rows per video, with the options moved on by one each; 4: right only if right in all. card_seconds: how long a card is shown.
    side: of the videos, in pixels. fps: their frames per second. hosts: videos or folders; empty: generated. seed: of everything random.
    Raises NeedleError for values that do not fit together.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    lengths: tuple[float, ...] = (30.0,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    count: int = 2
    rotations: int = OPTIONS
    card_seconds: float = 1.0
    side: int = 224
    fps: int = 4
    hosts: tuple[Path, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise NeedleError(f"--kinds {','.join(unknown)}: known are {', '.join(KINDS)}")
        if not (self.kinds and self.lengths and self.depths and self.count >= 1):
            raise NeedleError("nothing is requested: --kinds, --lengths and --depths need a value each, and --count is at least 1")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise NeedleError(f"--depths {','.join(map(str, self.depths))}: a depth lies in 0 ... 1")
        # Videos are named by them, and the later one would replace the earlier.
        for option, names in (
            ("kinds", self.kinds),
            ("lengths", [f"{length:g}" for length in self.lengths]),
            ("depths", [f"{depth:.2f}" for depth in self.depths]),
        ):
            if twice := sorted({name for name in names if list(names).count(name) > 1}):
                raise NeedleError(f"--{option}: {', '.join(twice)} comes twice; name each once (depths in hundredths)")
        if not 1 <= self.rotations <= OPTIONS:
            raise NeedleError(f"--rotations {self.rotations}: a question has {OPTIONS} options, so 1 ... {OPTIONS}")
        if self.side < 32 or self.side % 2 or self.fps < 1 or self.card_seconds * self.fps < 1:
            raise NeedleError("--side is an even number of at least 32, --fps at least 1, and a card is shown for at least one frame")


def build(folder: Path, settings: Settings, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Write `videos/`, `rows.jsonl`, `needles.jsonl`, `needle.json` (the settings) and `lmms_eval/` (the rows as a task) to a new folder.

    Returns counts of videos and rows.

    A row of needles.jsonl is about the row of rows.jsonl with its `line`: kind, seconds, depth, frames at which the cards begin, host,
    rotation. Nothing is left when it is interrupted. Raises NeedleError.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise NeedleError(f"{folder} exists and is not an empty folder; name another one")
    hosts = find_hosts(settings.hosts, max(settings.lengths))
    cells = [
        (kind, length, depth, number)
        for kind in settings.kinds
        for length in settings.lengths
        for depth in settings.depths
        for number in range(settings.count)
    ]
    temporary = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "videos").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    needles: list[dict[str, Any]] = []
    try:
        for done, (kind, length, depth, number) in enumerate(cells):
            # A stream of its own for each video: adding a kind or a length changes no other video.
            rng = np.random.default_rng([settings.seed, list(KINDS).index(kind), round(length * 1000), round(depth * 1000), number])
            needle = KINDS[kind](rng, settings.side, max(1, round(settings.card_seconds * settings.fps)))
            host = hosts[int(rng.integers(len(hosts)))]
            name = f"videos/{kind}-{length:g}s-{depth:.2f}-{number}.mp4"
            starts = _write(temporary / name, needle, host, length, depth, settings, rng)
            first = int(rng.integers(OPTIONS))
            for rotation in range(settings.rotations):
                rows.append({"id": f"{Path(name).stem}-{rotation}", "video": name, "conversations": _turns(needle, first + rotation)})
                about = {"line": len(rows), "kind": kind, "seconds": length, "depth": depth, "starts": starts, "rotation": rotation}
                needles.append(about | {"host": str(host.path.name) if host.path is not None else "generated"})
            if progress is not None:
                progress(done + 1, len(cells))
        for file, lines in (("rows.jsonl", rows), ("needles.jsonl", needles)):
            (temporary / file).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (temporary / "lmms_eval").mkdir()
        (temporary / "lmms_eval" / "needle.yaml").write_text(TASK, encoding="utf-8")
        (temporary / "lmms_eval" / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
        made = asdict(settings) | {"hosts": [str(path) for path in settings.hosts]}  # paths as given
        (temporary / "needle.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"videos": len(cells), "rows": len(rows)}


def place(lengths: list[int], total: int, depth: float) -> list[int]:
    """First frames of clips of `lengths` frames in a video of `total`: `GAP` apart, the group of them at `depth`. Raises NeedleError."""
    gap = round(GAP * total) if len(lengths) > 1 else 0
    span = sum(lengths) + gap * (len(lengths) - 1)
    if span > total:
        raise NeedleError(
            f"{len(lengths)} cards of together {sum(lengths)} frames do not fit a video of {total} frames; "
            "make the videos longer (--lengths), or show cards shorter (--card-seconds)"
        )
    start = round(depth * (total - span))
    return [start + sum(lengths[:index]) + gap * index for index in range(len(lengths))]


def _write(path: Path, needle: Needle, host: Host, length: float, depth: float, settings: Settings, rng: np.random.Generator) -> list[int]:
    total = round(length * settings.fps)
    starts = place([len(clip) for clip in needle.clips], total, depth)
    cards = {start + index: frame for start, clip in zip(starts, needle.clips) for index, frame in enumerate(clip)}
    shown = (cards.get(index, frame) for index, frame in enumerate(host_frames(host, total, settings.fps, settings.side, rng)))
    _encode(path, shown, settings)
    return starts


def _encode(path: Path, frames: Iterable[np.ndarray] | Iterator[np.ndarray], settings: Settings) -> None:
    """H.264 in MP4, the same bytes every time: no lookahead (preset ultrafast), one thread, and frames in arrays of their own.

    Of 120 encodings of the same frames, preset veryfast gave 6 different files, and ultrafast one.
    """
    options = {"preset": "ultrafast", "crf": "18", "g": str(2 * settings.fps), "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=settings.fps, options=options)
        stream.width = stream.height = settings.side
        stream.pix_fmt = "yuv420p"
        reformatter = VideoReformatter()  # one for all frames, one thread: starting others takes longer than a small frame
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = reformatter.reformat(frame, format="yuv420p", threads=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv420p")))
        container.mux(stream.encode(None))


def _turns(needle: Needle, rotation: int) -> list[dict[str, str]]:
    """The question with its options moved on by `rotation`, and the letter of the right one."""
    count = len(needle.options)
    options = [needle.options[(index - rotation) % count] for index in range(count)]
    lines = [f"{letter}. {text}" for letter, text in zip("ABCDEFGH", options)]
    question = "\n".join([f"<video>{needle.question}", *lines, INSTRUCTION])
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "ABCDEFGH"[options.index(needle.options[0])]}]
