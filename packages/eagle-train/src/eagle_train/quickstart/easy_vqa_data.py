"""easy-VQA as rows: one shape in one colour on each of 5 000 images, 48 248 questions about them, and videos made of the images.

Training rows hold up to two turns about one image, one on its shape and one on its colour, in an order in which the first question
doesn't give the second answer away. Turning and mirroring an image changes none of its answers, so rows show it in different positions.
Yes/no answers begin with their reasons (`it is red instead, so no`). Other rows describe an image, in words alone or next to the image, and
then have yes/no questions about it, so that comparing is learned from many examples: seven of eight answers about colours can be guessed.
Held-out rows are the package's own test questions, one each, on the images as they are.
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
DESCRIBE = "what is shown?"
TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.TRANSVERSE)
"""Positions in which an image is stored; the first is as it is."""


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Split(NamedTuple):
    """Images (paths) of easy-VQA with their questions, by image number."""

    paths: dict[int, str]
    turns: dict[int, list[Turn]]


def load_split(name: str) -> Split:
    """`train` or `test`. Raises ImportError saying what to install."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("the quickstart reads its images from the package easy-vqa: pip install 'eagle-train[quickstart]'") from error
    training = name == "train"
    paths = easy_vqa.get_train_image_paths() if training else easy_vqa.get_test_image_paths()
    questions = easy_vqa.get_train_questions() if training else easy_vqa.get_test_questions()
    turns: defaultdict[int, list[Turn]] = defaultdict(list)
    for question, answer, image in zip(*questions):
        turns[image].append(Turn(question, answer))
    return Split(dict(paths), dict(turns))


class Seen(NamedTuple):
    """What the questions of an image state, or None; they never contradict each other."""

    colour: str | None
    shape: str | None


def seen(turns: Iterable[Turn]) -> Seen:
    """Colour and shape of an image."""
    known = {word for turn in turns if not is_yes_or_no(turn) for word in f"{turn.question} {turn.answer}".replace("?", " ").split()}
    return Seen(*(next((name for name in names if name in known), None) for names in (COLOURS, SHAPES)))


def description(turns: Iterable[Turn]) -> str | None:
    """`a red circle`, when the questions of an image state both.

    The article is there for the tokens: behind it, words have those that they have in questions, and can be compared as they are.
    """
    colour, shape = seen(turns)
    return f"a {colour} {shape}" if colour and shape else None


def about_shape(turn: Turn) -> bool:
    """Whether the answer depends on the shape (else on the colour)."""
    if is_yes_or_no(turn):
        return any(shape in turn.question for shape in SHAPES)
    return turn.answer in SHAPES


def states_answer(turn: Turn) -> bool:
    """Whether the question itself states what is in the image ("what is the blue shape?")."""
    return not is_yes_or_no(turn) and any(word in turn.question for word in (*SHAPES, *COLOURS))


def is_yes_or_no(turn: Turn) -> bool:
    """Whether it is a yes/no question."""
    return turn.answer.rpartition(" ")[2] in ("yes", "no")


def is_negated(turn: Turn) -> bool:
    """Whether the question is negated ("is there not a circle?", with no before the noun)."""
    return not {"not", "no"}.isdisjoint(turn.question.split())


def stated(turn: Turn, image: Seen) -> Turn | None:
    """The turn whose yes/no answer begins with its reasons, `it is red instead, so no`; other answers stay. None: the image's is not known.

    What is seen, whether it is what the question names, and the conclusion are tokens one after the other. Each is easy to learn; a bare
    yes or no was not learned at all in the quickstart's time.
    """
    if not is_yes_or_no(turn):
        return turn
    found, article = (image.shape, "a") if about_shape(turn) else (image.colour, "it is")
    matches = found in turn.question.replace("?", "").split()
    return Turn(turn.question, f"{article} {found} {'as asked' if matches else 'instead'}, so {turn.answer}") if found else None


def about_colour(turn: Turn, colour: str) -> Turn:
    """A yes/no question about another colour, made one about the image's own: the other answer is right."""
    named = next(name for name in COLOURS if name in turn.question.split())
    return Turn(turn.question.replace(named, colour), "no" if turn.answer == "yes" else "yes")


def usual_answers(split: Split) -> dict[str, str]:
    """Of each yes/no question, the answer that is right most often."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for turns in split.turns.values():
        for turn in filter(is_yes_or_no, turns):
            counts[turn.question][turn.answer] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


def pair_turns(turns: Sequence[Turn], rng: np.random.Generator) -> list[list[Turn]]:
    """Conversations of one or two turns that use every turn once: shape and colour; the question that states one of them comes last."""
    mixed = [turns[index] for index in rng.permutation(len(turns))]
    piles = [[turn for turn in mixed if about_shape(turn)], [turn for turn in mixed if not about_shape(turn)]]
    rows = []
    while any(piles):
        row = [pile.pop() for pile in piles if pile]
        if rng.random() < 0.5:
            row.reverse()
        row.sort(key=states_answer)
        if len(row) == 2 and states_answer(row[0]):  # each question would state the other's answer
            rows.append([row.pop()])
        rows.append(row)
    return rows


def conversation(turns: Sequence[Turn], placeholder: str) -> list[dict[str, str]]:
    """Turns in the originals' form; the medium stands before the first question."""
    result = []
    for index, turn in enumerate(turns):
        result.append({"from": "human", "value": f"{placeholder}{turn.question}" if index == 0 else turn.question})
        result.append({"from": "gpt", "value": turn.answer})
    return result


def write_images(split: Split, path: Path, positions: int) -> None:
    """All images as PNG in an LMDB, key `<image>-<position>`, in `positions` of `TURNS`."""
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 30, sync=False, metasync=False)
    with environment.begin(write=True) as transaction:
        for number, image_path in split.paths.items():
            with Image.open(image_path) as file:
                image = file.convert("RGB")
            for position in range(positions):
                turn = TURNS[position]
                buffer = io.BytesIO()
                (image if turn is None else image.transpose(turn)).save(buffer, "PNG", compress_level=1)
                transaction.put(f"{number}-{position}".encode(), buffer.getvalue())
    environment.sync(True)
    environment.close()


def image_row(number: int, position: int, turns: Sequence[Turn], database: str) -> dict[str, Any]:
    """One row about one image."""
    return {"image": {"lmdb_file": database, "lmdb_key": f"{number}-{position}"}, "conversations": conversation(turns, "<image>")}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """JSONL; returns how many rows."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def description_rows(split: Split, database: str, positions: int) -> list[dict[str, Any]]:
    """A description of every image whose questions state it, in every position."""
    described = {number: text for number, turns in split.turns.items() if (text := description(turns))}
    return [
        image_row(number, position, [Turn(DESCRIBE, text)], database) for position in range(positions) for number, text in described.items()
    ]


def question_rows(split: Split, database: str, positions: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """All training questions, once each, except the yes/no questions on what the others do not state."""
    rows = []
    for number, turns in split.turns.items():
        image = seen(turns)
        turns = [answered for turn in turns if (answered := stated(turn, image)) is not None]
        for index, row in enumerate(pair_turns(turns, rng)):
            rows.append(image_row(number, (number + index) % positions, row, database))
    return rows


def comparisons(turns: Sequence[Turn], usual: dict[str, str], rng: np.random.Generator) -> list[Turn]:
    """Yes/no questions of an image with reasons: all on its shape, at most two that name another colour, at least one that names its own.

    Only one colour question in eight names the image's, and comparing takes many; where there is none, one is made of a question about
    another colour.
    """
    image = seen(turns)
    mixed = [turns[index] for index in rng.permutation(len(turns)) if is_yes_or_no(turns[index])]
    guessable = [turn for turn in mixed if turn.answer == usual[turn.question] and not about_shape(turn)]
    chosen = [turn for turn in mixed if turn not in guessable]
    if guessable and all(map(about_shape, chosen)) and image.colour is not None:
        guessable[0] = about_colour(guessable[0], image.colour)
    chosen = [answered for turn in chosen + guessable[:2] if (answered := stated(turn, image)) is not None]
    return [chosen[index] for index in rng.permutation(len(chosen))]


def comparison_rows(split: Split, database: str, positions: Iterable[int], rng: np.random.Generator) -> list[dict[str, Any]]:
    """A description of an image, then its `comparisons`."""
    usual = usual_answers(split)
    rows = []
    for position in positions:
        for number, turns in split.turns.items():
            if (text := description(turns)) is not None:
                rows.append(image_row(number, position, [Turn(DESCRIBE, text), *comparisons(turns, usual, rng)], database))
    return rows


def sentence_rows(split: Split, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The same without images: the description stands in front of the first question.

    Comparing is a matter of language. Of such rows it is learned in a few hundred steps, before vision, for which there is time then.
    """
    usual = usual_answers(split)
    rows = []
    for turns in split.turns.values():
        if (text := description(turns)) is not None and (asked := comparisons(turns, usual, rng)):
            rows.append({"conversations": conversation(asked, f"{text}. ")})
    return rows


def test_rows(split: Split, database: str) -> list[dict[str, Any]]:
    """All test questions, one a row."""
    return [image_row(number, 0, [turn], database) for number, turns in split.turns.items() for turn in turns]
