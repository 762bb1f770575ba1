"""All rows, media and the tokenizer of the experiments, made once, by many processes; every arm reads the same files.

Sources by experiment (JSONL files next to the folder of media):

- video: `clips_F` (F frames, 4 to 512) for training; `still_F` and `order_F` are held out. A card is shown for one frame, in training
  videos of 128 frames and more for four, so that it is seen at every context; in `order_256` and `order_512` for two.
- text: `notes` (a text with a code in it, then a video), once whole and once cut for a fixed number of frames, and `codes` (a short text
  alone); `code_*`, `card_*` are held out.
- images: `tiles` (four single tiles), `large` (one image of four aspects), once as they are and once in the size of InternVL's grid;
  `several` (three of them in a row).
- answers: `short` and `long`, the same clips with a short and a long answer.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from clips import DESCRIBE, SECOND, Batch, Clip, read_clips, row, test_row, training_row, turns, write_clips
from letters import ASPECTS, HEIGHTS, LARGE, QUESTION, Picture, answer, draw, draw_tile, for_internvl, save, size_of
from vocabulary import make_tokenizer

SHORTEST = (4, 8)
LENGTHS = (16, 32, 64, 128, 256, 512)
"""Frames of videos; the shortest are for base models alone."""
MAX_TILES = 12
_TEXT = "it rains and the sea is calm we walk home by a long road under trees then sleep"
_CODES = "seven lemon tiger piano river candle window rocket silver marble garden button"
WORDS, CODES = _TEXT.split(), _CODES.split()
CODE = "What is the code?"
TEXT_WORDS = (10, 330)
TEXT_STRATA = {"short_text": (10, 60), "long_text": (280, 330)}
"""Words of the texts next to a video, in training and held out."""
FIXED_WORDS = 160
"""Of the arm with fixed frames: words of text that fit next to them (24 frames in 512 tokens, or 30 in 640)."""


class Amounts(NamedTuple):
    """How much is made. clips: training videos by length, a third of them with one card. test: held-out questions of a source."""

    clips: tuple[int, ...] = (4000, 4000, 2800, 1400, 800, 480, 480, 240)
    notes: int = 3000
    tiles: int = 48_000
    pictures: int = 8000
    several: int = 4000
    test: int = 60

    def only(self, clips: bool, images: bool) -> Amounts:
        """Few of what is not needed."""
        some = self if clips else self._replace(clips=FEW.clips, notes=FEW.notes)
        return some if images else some._replace(tiles=FEW.tiles, pictures=FEW.pictures, several=FEW.several)


FEW = Amounts((12, 12, 12, 8, 8, 4, 4, 4), 8, 32, 16, 8, 4)


def make(root: Path, amounts: Amounts, processes: int) -> None:
    """Write everything to `root`, which must not exist."""
    building = root.with_name(root.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "images").mkdir(parents=True)
    batches = batches_of(building, amounts)
    with ProcessPoolExecutor(processes) as pool:
        # Longest first, so that the processes end together.
        clips = [pool.submit(write_clips, batch) for batch in sorted(batches, key=lambda batch: -batch.frames * batch.number)]
        pictures = {
            name: [pool.submit(_pictures, building, name, part, count) for part, count in enumerate(_parts(total))]
            for name, total in _picture_sets(amounts).items()
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


def batches_of(root: Path, amounts: Amounts) -> list[Batch]:
    """Videos in batches of a few seconds of work; seeds tell them, and training from held-out ones, apart."""
    batches = []

    def add(name: str, kind: str, frames: int, card: int, count: int) -> None:
        size = max(4, 8000 // frames)
        for start in range(0, count, size):
            folder = root / "clips" / f"{name}-{kind}-{frames}-{card}-{start}"
            batches.append(Batch(folder, kind, frames, card, min(size, count - start), len(batches)))

    for frames, count in zip(SHORTEST + LENGTHS, amounts.clips):
        card = 1 if frames < 128 else 4
        add("train", "still", frames, card, count // 3)
        add("train", "order", frames, card, count - count // 3)
    for frames in (32, 512):
        add("test", "still", frames, 1, amounts.test)
    for frames, card in ((8, 1), (32, 1), (256, 2), (512, 2)):
        add("test", "order", frames, card, amounts.test)
    add("notes", "still", 64, 4, amounts.notes // 2)
    add("notes", "still", 16, 1, amounts.notes - amounts.notes // 2)
    add("noted", "still", 64, 2, amounts.test)
    return batches


def _video_rows(root: Path, batches: list[Batch], amounts: Amounts) -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(1)
    clips: dict[tuple[str, str, int], list[Clip]] = {}
    for batch in batches:
        clips.setdefault((batch.folder.name.split("-")[0], batch.kind, batch.frames), []).extend(read_clips(batch, root))
    rows: dict[str, list[dict[str, Any]]] = {}
    for frames in SHORTEST + LENGTHS:
        rows[f"clips_{frames}"] = [training_row(clip, rng) for kind in ("still", "order") for clip in clips["train", kind, frames]]
    for (use, kind, frames), found in clips.items():
        if use == "test":
            rows[f"{kind}_{frames}"] = [test_row(clip) for clip in found]
    noted = [*clips["notes", "still", 64], *clips["notes", "still", 16]]
    whole = [_note(clip, rng, TEXT_WORDS) for clip in noted]
    rows["codes"] = [_code_row(rng) for _ in range(amounts.notes)]
    rows["notes"] = [_note_row(note, rng) for note in whole]
    rows["notes_cut"] = [_note_row(_cut(note), rng) for note in whole]
    for stratum, words in TEXT_STRATA.items():
        held_out = [_note(clip, rng, words) for clip in clips["noted", "still", 64]]
        for suffix, notes in (("", held_out), ("_cut", [_cut(note) for note in held_out])):
            rows[f"code_{stratum}{suffix}"] = [row(note.clip, [(CODE, note.code)], note.text) for note in notes]
            rows[f"card_{stratum}{suffix}"] = [row(note.clip, turns(note.clip), note.text) for note in notes]
    return rows | _answer_rows(clips, rng)


class _Note(NamedTuple):
    text: str
    code: str
    clip: Clip


def _text(rng: np.random.Generator, words: tuple[int, int]) -> tuple[str, str]:
    """A text of words with one sentence in it that states a code, and the code."""
    count, code = int(rng.integers(*words)), str(rng.choice(CODES))
    text = [WORDS[index] for index in rng.integers(len(WORDS), size=count)]
    text.insert(int(rng.integers(count + 1)), f"the code is {code}")
    return " ".join(text) + "\n", code


def _note(clip: Clip, rng: np.random.Generator, words: tuple[int, int]) -> _Note:
    return _Note(*_text(rng, words), clip)


def _code_row(rng: np.random.Generator) -> dict[str, Any]:
    """A short text without a video, of which finding a code is learned sooner."""
    text, code = _text(rng, TEXT_STRATA["short_text"])
    return row(None, [(CODE, code)], text)


def _cut(note: _Note) -> _Note:
    """The note with the beginning of its text, as much as fits next to a fixed number of frames."""
    return note._replace(text=" ".join(note.text.split()[:FIXED_WORDS]) + "\n")


def _note_row(note: _Note, rng: np.random.Generator) -> dict[str, Any]:
    asked = [(CODE, note.code), *turns(note.clip)]
    return row(note.clip, [asked[index] for index in rng.permutation(2)], note.text)


def _answer_rows(clips: dict[tuple[str, str, int], list[Clip]], rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """The same kind of clips with answers of one colour and of a long description, about twenty times as many tokens."""
    rows: dict[str, list[dict[str, Any]]] = {}
    train = [clip for frames in SHORTEST for clip in clips["train", "order", frames]]
    for use, found in (("", train), ("_test", clips["test", "order", 8])):
        rows["short" + use] = [row(clip, [(SECOND, clip.colours[1])]) for clip in found]
        rows["long" + use] = [row(clip, [(DESCRIBE, described(clip))]) for clip in found]
    order = rng.permutation(len(rows["short"]))
    return rows | {name: [rows[name][index] for index in order] for name in ("short", "long")}


def described(clip: Clip) -> str:
    """A long answer, most of which is the same for all clips."""
    first, second, third = clip.colours
    return (
        f"In the video there are three white cards among other pictures. On the first white card it is {first}, then there is another "
        f"white card on which it is {second}, and on the last white card of the video it is {third}. That is all that is shown."
    )


# ---- images ----------------------------------------------------------------------------------------------------------------------


def _picture_sets(amounts: Amounts) -> dict[str, int]:
    """Number of the pictures of each set."""
    return {
        "tiles": amounts.tiles,
        "tiles_test": 4 * amounts.test,
        "large": amounts.pictures,
        "large_test": 4 * amounts.test,
        "several": 3 * amounts.several,
        "several_test": 6 * amounts.test,
    }


def _parts(total: int, size: int = 1000) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _pictures(root: Path, name: str, part: int, count: int) -> list[Picture]:
    """Draw `count` pictures of a set; large ones also in the size of InternVL's grid."""
    rng = np.random.default_rng([part, *name.encode()])
    pictures = []
    for number in range(count):
        path = f"images/{name}-{part}-{number}.png"
        if name.startswith("tiles"):
            image, letter = draw_tile(rng)
        else:
            image, letter = draw(*size_of(list(ASPECTS.values())[number % len(ASPECTS)], LARGE), HEIGHTS, rng)
        save(image, root / path)
        if name.startswith("large"):
            save(for_internvl(image, MAX_TILES), root / internvl_path(path))
        pictures.append(Picture(path, letter))
    return pictures


def internvl_path(path: str) -> str:
    """Where the same picture is in the size of InternVL's grid."""
    return path.removesuffix(".png") + "-internvl.png"


def _image_rows(drawn: dict[str, list[Picture]], amounts: Amounts) -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(2)
    rows = {name: [_picture_row(drawn[name][at : at + 4]) for at in range(0, len(drawn[name]), 4)] for name in ("tiles", "tiles_test")}
    for suffix, place in (("", str), ("_internvl", internvl_path)):
        moved = {name: [one._replace(path=place(one.path)) for one in drawn[name]] for name in ("large", "large_test")}
        rows["large" + suffix] = [_picture_row([one]) for one in moved["large"]]
        for index, aspect in enumerate(ASPECTS):
            rows[f"letters_{aspect}{suffix}"] = [_picture_row([one]) for one in moved["large_test"][index :: len(ASPECTS)]]
    for name in ("several", "several_test"):
        mixed = [drawn[name][index] for index in rng.permutation(len(drawn[name]))]  # any aspects next to each other
        rows[name] = [_picture_row(mixed[at : at + 3]) for at in range(0, len(mixed), 3)]
    return rows


def _picture_row(pictures: list[Picture]) -> dict[str, Any]:
    """The question about all letters on some pictures."""
    made = row(None, [(QUESTION, answer([one.letter for one in pictures]))], "<image>" * len(pictures))
    return {"image": [one.path for one in pictures]} | made
