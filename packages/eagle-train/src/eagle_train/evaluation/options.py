"""Multiple choice: the options that a question lists, and which of them an answer names."""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_INLINE = re.compile(r"\(([A-Z])\)[ \t]+(.+?)(?=[ \t]*[,;]?[ \t]*\([A-Z]\)[ \t]|[ \t]*$)", re.MULTILINE)
_LEADING = re.compile(r"^\s*\(?([A-Z])\)?(?:[.):,]|\s*$)")
_NAMED = re.compile(r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is)?\s*:?\s*\(?([A-Z])\b")


def normalised(text: str) -> str:
    """The text without differences that do not make an answer wrong: case, outer punctuation and repeated spaces."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


class Options(NamedTuple):
    """stem: the question without its options. texts: the options A, B, C, ... in order."""

    stem: str
    texts: tuple[str, ...]

    @property
    def letters(self) -> str:
        """`ABC...`, one per option."""
        return "".join(chr(ord("A") + index) for index in range(len(self.texts)))

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """The same for questions that differ only in the order of their options."""
        return normalised(self.stem), tuple(sorted(normalised(text) for text in self.texts))


def options_of(question: str) -> Options | None:
    """The options of a question: lines `A. text`, `A) text` or `(A) text`, or `(A) text (B) text` in one line.

    None when there are fewer than two, or their letters are not A, B, C, ... in order.
    """
    for pattern in (_LINE, _INLINE):
        found = list(pattern.finditer(question))
        letters = "".join(match[1] for match in found)
        if len(found) >= 2 and letters == "".join(chr(ord("A") + index) for index in range(len(found))):
            return Options(pattern.sub("", question).strip(), tuple(match[2] for match in found))
    return None


def chosen(answer: str, options: Options | None) -> str | None:
    """The letter of the option that an answer names: by its text, by a leading letter (`B`, `(B)`, `B. a cat`), or as `answer is B`.

    None when it names none. Without options only letters are known.
    """
    if options is not None:
        texts = [normalised(text) for text in options.texts]
        if texts.count(normalised(answer)) == 1:
            return options.letters[texts.index(normalised(answer))]
    match = _LEADING.match(answer) or _NAMED.search(answer)
    letter = match[1] if match else None
    return letter if letter is not None and (options is None or letter in options.letters) else None


def rephrased(answer: str, options: Options) -> list[str] | None:
    """What `answer` is when it names each of the options, in the same words; None when it names none.

    `B` gives A, B, C, ...; `(B) a cat` gives (A) with its text; an answer that is an option's text gives the texts.
    """
    right = chosen(answer, options)
    if right is None:
        return None
    if normalised(answer) in map(normalised, options.texts):
        return list(options.texts)
    match = _LEADING.match(answer) or _NAMED.search(answer)
    assert match is not None
    head, tail, text = answer[: match.start(1)], answer[match.end(1) :], options.texts[options.letters.index(right)]
    return [head + letter + tail.replace(text, other) for letter, other in zip(options.letters, options.texts)]
