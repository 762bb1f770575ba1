"""All rows, media and the tokenizer of the experiments, made once, by many processes; every arm reads the same files.

Sources by experiment (JSONL files next to the folder of media):

- video: `cards` (single images) and `clips_F` (F frames, 4 to 512) for training; `still_F`, `first_F` and `order_F` are held out. Half of
  the long training videos show a card for one frame, half for four; held-out ones for one.
- text: `notes` (a text with a code in it, then a video), once whole and once cut for a fixed number of frames; `code_*`, `card_*` held out.
- images: `tile` (one tile), `large` (four aspects), once as they are and once in the size of InternVL's grid; `several` (many in a row).
- answers: `short` and `long`, the same clips with a short and a long answer.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from clips import ORDER, Batch, Clip, card_rows, read_clips, row, test_row, training_row, turns, write_clips
from digits import ASPECTS, COLOURS, TILE, Picture, draw, for_internvl, question, save, size_of
from vocabulary import make_tokenizer

SHORTEST = (4, 8)
LENGTHS = (16, 32, 64, 128, 256, 512)
"""Frames of videos; the shortest are for base models alone."""
MAX_TILES = 12
LARGE = 45.0
"""Area of a large image in tiles."""
HEIGHTS = {"tile": (6.0, 20.0), "large": (16.0, 26.0)}
"""Height of a digit in pixels."""
WORDS = (
    "it",
    "rains",
    "and",
    "the",
    "sea",
    "is",
    "calm",
    "we",
    "walk",
    "home",
    "by",
    "a",
    "long",
    "road",
    "under",
    "trees",
    "then",
    "sleep",
)
CODE = "What is the code?"
TEXT_STRATA = {"short_text": (20, 200), "long_text": (1200, 1700)}
"""Words of the held-out texts."""
FIXED_FRAMES, FIXED_WORDS = 64, 1000
"""Of the arm with fixed frames: frames of a video, and words of text that fit next to them in 2K tokens."""


class Amounts(NamedTuple):
    """How much is made. clips: training videos of each kind by length. test: held-out questions of a source."""

    clips: tuple[int, ...] = (2000, 2000, 1600, 1400, 800, 400, 200, 100)
    cards: int = 3000
    notes: int = 1000
    tiles: int = 30_000
    pictures: int = 8000
    several: int = 2500
    test: int = 80


SMALL = Amounts((8, 8, 12, 8, 4, 2, 2, 2), 200, 8, 8, 8, 4, 2)


def make(root: Path, amounts: Amounts, processes: int) -> None:
    """Write everything to `root`, which must not exist."""
    building = root.with_name(root.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "images").mkdir(parents=True)
    batches = _batches(building, amounts)
    with ProcessPoolExecutor(processes) as pool:
        # Longest first, so that the processes end together.
        clips = [pool.submit(write_clips, batch) for batch in sorted(batches, key=lambda batch: -batch.frames * batch.count)]
        pictures = {
            name: [pool.submit(_pictures, building, name, part, count, form) for part, count in enumerate(_parts(total))]
            for name, (form, total) in _picture_sets(amounts).items()
        }
        for job in clips:
            job.result()
        drawn = {name: [one for job in jobs for one in job.result()] for name, jobs in pictures.items()}
    rows = _video_rows(building, batches, amounts) | _image_rows(drawn, amounts)
    for name, content in rows.items():
        (building / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in content), encoding="utf-8")
    texts = [turn["value"] for content in rows.values() for one in content[:100] for turn in one["conversations"]]
    make_tokenizer(texts, building / "tokenizer")
    building.rename(root)


# ---- videos ----------------------------------------------------------------------------------------------------------------------


def _batches(root: Path, amounts: Amounts) -> list[Batch]:
    """Videos in batches of at most about 20 seconds of work; seeds tell them, and training from held-out ones, apart."""
    batches = []

    def add(name: str, kind: str, frames: int, card: int, count: int) -> None:
        size = max(4, 12_000 // frames)
        for start in range(0, count, size):
            folder = root / "clips" / f"{name}-{kind}-{frames}-{card}-{start}"
            batches.append(Batch(folder, kind, frames, card, min(size, count - start), len(batches)))

    for frames, count in zip(SHORTEST + LENGTHS, amounts.clips):
        for kind in ("still", "order"):
            if frames < 128:
                add("train", kind, frames, 1, count)
            else:
                add("train", kind, frames, 1, count // 2)
                add("train", kind, frames, 4, count - count // 2)
    for frames in (32, 512):
        for kind in ("still", "order"):
            add("test", kind, frames, 1, amounts.test)
    add("test", "order", 16, 1, amounts.test)
    add("notes", "still", 256, 4, amounts.notes // 2)
    add("notes", "still", 64, 1, amounts.notes - amounts.notes // 2)
    add("noted", "still", 256, 2, amounts.test)
    return batches


def _video_rows(root: Path, batches: list[Batch], amounts: Amounts) -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(1)
    clips: dict[tuple[str, str, int], list[Clip]] = {}
    for batch in batches:
        clips.setdefault((batch.folder.name.split("-")[0], batch.kind, batch.frames), []).extend(read_clips(batch, root))
    rows = {"cards": card_rows(root / "cards", root, amounts.cards, rng)}
    for frames in SHORTEST + LENGTHS:
        rows[f"clips_{frames}"] = [training_row(clip, rng) for kind in ("still", "order") for clip in clips["train", kind, frames]]
    for (use, kind, frames), found in clips.items():
        if use == "test":
            rows[f"{kind}_{frames}"] = [test_row(clip) for clip in found]
            if kind == "order":
                rows[f"first_{frames}"] = [row(clip, turns(clip)[:1]) for clip in found[::2]]
    noted = [*clips["notes", "still", 256], *clips["notes", "still", 64]]
    whole = [_note(clip, rng, (20, 1700)) for clip in noted]
    rows["notes"] = [_note_row(note, rng) for note in whole]
    rows["notes_cut"] = [_note_row(_cut(note), rng) for note in whole]
    for stratum, words in TEXT_STRATA.items():
        held_out = [_note(clip, rng, words) for clip in clips["noted", "still", 256]]
        for suffix, notes in (("", held_out), ("_cut", [_cut(note) for note in held_out])):
            rows[f"code_{stratum}{suffix}"] = [row(note.clip, [(CODE, note.code)], note.text) for note in notes]
            rows[f"card_{stratum}{suffix}"] = [row(note.clip, turns(note.clip), note.text) for note in notes]
    return rows | _answer_rows(clips, rng)


class _Note(NamedTuple):
    text: str
    code: str
    clip: Clip


def _note(clip: Clip, rng: np.random.Generator, words: tuple[int, int]) -> _Note:
    """A text of words with one sentence in it that states a code."""
    count, code = int(rng.integers(*words)), str(rng.integers(10, 100))
    text = [WORDS[index] for index in rng.integers(len(WORDS), size=count)]
    text.insert(int(rng.integers(count + 1)), f"the code is {code}")
    return _Note(" ".join(text) + "\n", code, clip)


def _cut(note: _Note) -> _Note:
    """The note with the beginning of its text, as much as fits next to a fixed number of frames."""
    return note._replace(text=" ".join(note.text.split()[:FIXED_WORDS]) + "\n")


def _note_row(note: _Note, rng: np.random.Generator) -> dict[str, Any]:
    asked = [(CODE, note.code), *turns(note.clip)]
    return row(note.clip, [asked[index] for index in rng.permutation(2)], note.text)


def _answer_rows(clips: dict[tuple[str, str, int], list[Clip]], rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """The same kind of clips with answers of one scene and of a long description, about ten times as many tokens."""
    rows: dict[str, list[dict[str, Any]]] = {}
    train = [clip for frames in (8, 16) for clip in clips["train", "order", frames]]
    for use, found in (("", train), ("_test", clips["test", "order", 16])):
        rows["short" + use] = [row(clip, turns(clip)[:1]) for clip in found]
        rows["long" + use] = [row(clip, [(ORDER, described(clip))]) for clip in found]
    order = rng.permutation(len(train))
    return rows | {name: [rows[name][index] for index in order] for name in ("short", "long")}


def described(clip: Clip) -> str:
    """A long answer, most of which is the same for all clips."""
    first, second, third = clip.scenes
    return (
        f"In the video there are three white cards among other pictures. On the first white card there is {first}, then there is another "
        f"white card on which there is {second}, and on the last white card of the video there is {third}. That is all that is shown."
    )


# ---- images ----------------------------------------------------------------------------------------------------------------------


def _picture_sets(amounts: Amounts) -> dict[str, tuple[str, int]]:
    """Form (tile, large, or single) and number of the pictures of each set."""
    return {
        "tile": ("tile", amounts.tiles),
        "large": ("large", amounts.pictures),
        "large_test": ("large", 4 * amounts.test),
        "single": ("single", 4 * amounts.several),
        "single_test": ("single", 8 * amounts.test),
    }


def _parts(total: int, size: int = 500) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _pictures(root: Path, name: str, part: int, count: int, form: str) -> list[Picture]:
    """Draw `count` pictures of a set; large ones also in the size of InternVL's grid."""
    rng = np.random.default_rng([part, *name.encode()])
    pictures = []
    for number in range(count):
        size, heights = (TILE, TILE), HEIGHTS["tile"]
        if form != "tile":
            aspect = list(ASPECTS.values())[number % len(ASPECTS)]
            size, heights = size_of(aspect, LARGE), HEIGHTS["large"]
        # Four pictures in a row have different colours, and a colour is on pictures of every aspect.
        colours = (list(COLOURS)[(number + number // 4) % len(COLOURS)],) if form == "single" else ()
        image, digits = draw(*size, heights, rng, colours)
        path = f"images/{name}-{part}-{number}.jpg"
        save(image, root / path)
        if form == "large":
            save(for_internvl(image, MAX_TILES), root / internvl_path(path))
        pictures.append(Picture(path, digits))
    return pictures


def internvl_path(path: str) -> str:
    """Where the same picture is in the size of InternVL's grid."""
    return path.removesuffix(".jpg") + "-internvl.jpg"


def _image_rows(drawn: dict[str, list[Picture]], amounts: Amounts) -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(2)
    rows = {"tile": [_picture_row([one], rng) for one in drawn["tile"]]}
    for suffix, place in (("", str), ("_internvl", internvl_path)):
        same = np.random.default_rng(3)  # the same questions in both forms
        moved = {name: [one._replace(path=place(one.path)) for one in drawn[name]] for name in ("large", "large_test")}
        rows["large" + suffix] = [_picture_row([one], same) for one in moved["large"]]
        for index, aspect in enumerate(ASPECTS):
            rows[f"digits_{aspect}{suffix}"] = [_picture_row([one], same, 1) for one in moved["large_test"][index :: len(ASPECTS)]]
    rows["several"] = [_picture_row(some, rng) for some in _groups(drawn["single"], amounts.several, rng)]
    rows["several_test"] = [_picture_row(some, rng, 1) for some in _groups(drawn["single_test"], 2 * amounts.test, rng)]
    return rows


def _groups(pictures: list[Picture], count: int, rng: np.random.Generator) -> list[list[Picture]]:
    """Two to four pictures of different colours in any order, `count` times."""
    groups = []
    for number in range(count):
        four = pictures[4 * number : 4 * number + 4]
        groups.append([four[index] for index in rng.permutation(4)[: int(rng.integers(2, 5))]])
    return groups


def _picture_row(pictures: list[Picture], rng: np.random.Generator, most: int | None = None) -> dict[str, Any]:
    """Questions about all digits on some pictures, or the first `most` of them."""
    asked = [(question(colour), digit) for one in pictures for colour, digit in one.digits.items()]
    asked = [asked[index] for index in rng.permutation(len(asked))][:most]
    made = row(None, asked, "<image>" * len(pictures))
    return {"image": [one.path for one in pictures]} | made
