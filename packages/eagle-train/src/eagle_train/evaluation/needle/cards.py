"""Needles: white cards with coloured shapes that are shown for a short time, and multiple-choice questions about them.

Everything that a question needs is drawn, so no fonts are read, and the text alone does not tell the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "orange": (245, 140, 20),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPTIONS = 4
"""Options of a question."""


class Needle(NamedTuple):
    """What is put into a video: clips, uint8 [frames, side, side, 3] each, in the order in which they are shown; the options of the
    question, the first of them right."""

    clips: tuple[np.ndarray, ...]
    question: str
    options: tuple[str, ...]


def still(rng: np.random.Generator, side: int, frames: int) -> Needle:
    """One card with one shape; wrong options share its colour or its shape, or neither."""
    colour, other = _two(rng, list(COLOURS))
    shape, second = _two(rng, SHAPES)
    options = [f"a {c} {s}" for c in (colour, other) for s in (shape, second)]
    return Needle((_shown(_card([(shape, colour, (0.5, 0.5))], side), frames),), "Which shape is on the white card?", tuple(options))


def motion(rng: np.random.Generator, side: int, frames: int) -> Needle:
    """A shape that crosses a card within twice the time of a still."""
    colour, shape = _one(rng, list(COLOURS)), _one(rng, SHAPES)
    right = _one(rng, list(DIRECTIONS))
    x, y = DIRECTIONS[right]
    way = np.linspace(-0.3, 0.3, 2 * frames)
    clip = np.stack([_card([(shape, colour, (0.5 + x * at, 0.5 + y * at))], side) for at in way])
    wrong = [name for name in DIRECTIONS if name != right]
    return Needle((clip,), f"In which direction does the {colour} {shape} on the white card move?", (right, *wrong))


def order(rng: np.random.Generator, side: int, frames: int) -> Needle:
    """Three cards with different shapes and colours."""
    shapes, colours = rng.permutation(SHAPES)[:3].tolist(), rng.permutation(list(COLOURS))[:3].tolist()
    clips = tuple(_shown(_card([(shape, colour, (0.5, 0.5))], side), frames) for shape, colour in zip(shapes, colours))
    orders = [", ".join(f"a {colours[index]} {shapes[index]}" for index in way) for way in itertools.permutations(range(3))]
    wrong = rng.permutation(orders[1:])[: OPTIONS - 1].tolist()
    return Needle(clips, "In which order do the white cards appear?", (orders[0], *wrong))


def count(rng: np.random.Generator, side: int, frames: int) -> Needle:
    """Two to five cards with the same shape."""
    numbers = range(2, 2 + OPTIONS)
    right = int(rng.choice(numbers))
    card = _card([(_one(rng, SHAPES), _one(rng, list(COLOURS)), (0.5, 0.5))], side)
    wrong = [str(number) for number in numbers if number != right]
    return Needle((_shown(card, frames),) * right, "How many times does a white card appear?", (str(right), *wrong))


def linked(rng: np.random.Generator, side: int, frames: int) -> Needle:
    """A shape, and two cards with dots: those in the colour of the shape are counted. Neither clue is enough alone."""
    shape = _one(rng, SHAPES[1:])
    colour, other = _two(rng, list(COLOURS))
    right, decoy, *more = rng.permutation(np.arange(2, 7))[:OPTIONS].tolist()
    cards = [_card([(shape, colour, (0.5, 0.5))], side), _card(_dots(right, colour), side), _card(_dots(decoy, other), side)]
    clips = tuple(_shown(cards[index], frames) for index in rng.permutation(3))
    question = f"A white card shows a {shape}. How many dots are on the white card whose dots have the colour of the {shape}?"
    return Needle(clips, question, tuple(map(str, (right, decoy, *more))))


KINDS: dict[str, Callable[[np.random.Generator, int, int], Needle]] = {
    "still": still,
    "motion": motion,
    "order": order,
    "count": count,
    "linked": linked,
}
"""(random numbers, side in pixels, frames of a still) -> needle."""

Mark = tuple[str, str, tuple[float, float]]
"""Shape, colour, centre as shares of the side."""


def _card(marks: Sequence[Mark], side: int, radius: float = 0.17) -> np.ndarray:
    """uint8 [side, side, 3]: a white card with a black edge."""
    scale = 4  # drawn larger and reduced, for smooth edges
    size = side * scale
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, size - 1, size - 1), outline="black", width=max(1, size // 32))
    if len(marks) > 1:
        radius /= 2
    for shape, colour, (x, y) in marks:
        _draw(draw, shape, COLOURS[colour], x * size, y * size, radius * size)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def _draw(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: float, y: float, r: float) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=colour)
    else:
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)


def _dots(number: int, colour: str) -> list[Mark]:
    """Up to six dots in two rows."""
    return [("circle", colour, (0.25 + 0.25 * (index % 3), 0.35 + 0.3 * (index // 3))) for index in range(number)]


def _shown(card: np.ndarray, frames: int) -> np.ndarray:
    return np.broadcast_to(card, (frames, *card.shape))


def _one(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _two(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, str]:
    first, second = rng.choice(len(names), 2, replace=False).tolist()
    return names[first], names[second]  # pyright: ignore[reportReturnType]
