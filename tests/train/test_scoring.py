"""Metrics against values worked out by hand, laws over random texts, and a slow edit distance."""

import random
from functools import cache

import pytest

from eagle_train.evaluation.metrics import Answer, score_of
from eagle_train.evaluation.options import Options, chosen, options_of, rephrased
from eagle_train.evaluation.scoring import METRICS, anls, choice, contains, exact, f1, final_answer, numeric, temporal_iou

QUESTION = "<video>What is shown?\nA. a red circle\nB. a dog\nC. nothing"


def words(seed, count=5):
    rng = random.Random(seed)
    return " ".join(rng.choice(["a", "red", "Dog", "cat", "12", "3.5"]) for _ in range(count))


@pytest.mark.parametrize("name", METRICS)
def test_values_lie_in_0_to_1_and_an_answer_equals_itself(name):
    for seed in range(200):
        given, expected = words(seed, seed % 7), words(seed + 1000, 1 + seed % 5)
        assert 0 <= METRICS[name](given, expected, "") <= 1
    itself = {"choice": "B", "temporal_iou": "3 to 5.5 s"}.get(name, "12 red dogs")
    assert METRICS[name](itself, itself, "") == 1
    assert METRICS[name]("", itself, "") == 0


@pytest.mark.parametrize(
    ("text", "marker", "parts"),
    [
        ("it is red, so no", "so ", ("it is red, so ", "no")),
        ("so so, so no", "so ", ("so so, so ", "no")),
        ("no", "so ", ("", "no")),
        ("it is red, so no", None, ("", "it is red, so no")),
    ],
)
def test_an_answer_stands_behind_its_reasons(text, marker, parts):
    assert final_answer(text, marker) == parts


def test_exact_and_contains():
    assert exact(" Red circle.", "red  circle") == 1
    assert exact("a red circle", "red circle") == 0
    assert contains("It is a red circle.", "red circle") == 1
    assert contains("it is bored circle", "red circle") == 0, "words, not letters"
    assert contains("anything", "") == 0


@pytest.mark.parametrize(
    ("given", "expected", "value"),
    [("13", "12.5", 1), ("13.2", "12.5", 0), ("about 1,250 people", "1250", 1), ("-5", "5", 0), ("none", "0", 0), ("0", "0", 1)]
    + [("50 %", "52%", 1), (".5", "0.5", 1), ("1e3", "1000", 1), ("many", "many", 1), ("few", "many", 0)],
)
def test_numeric(given, expected, value):
    assert numeric(given, expected) == value


@pytest.mark.parametrize(
    ("given", "expected", "value"),
    [
        ("from 10 to 20 s", "15 - 25", 5 / 15),
        ("1:00 - 1:30", "60 90", 1),
        ("0:01:00-0:01:30", "75 s to 90 s", 0.5),
        ("90 to 60", "60 to 90", 1),
        ("at 70 s", "60 to 90", 0),
        ("0 to 5", "6 to 7", 0),
        ("no idea", "6 to 7", 0),
    ],
)
def test_temporal_iou(given, expected, value):
    assert temporal_iou(given, expected) == pytest.approx(value)


def test_f1_counts_words_as_squad_does():
    assert f1("the red dog", "a red cat") == pytest.approx(0.5)
    assert f1("dog dog", "dog") == pytest.approx(2 / 3)


def test_anls_against_a_slow_edit_distance():
    @cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        a, b = ("".join(rng.choice("abc") for _ in range(rng.randint(1, 7))) for _ in range(2))
        share = distance(a, b) / max(len(a), len(b))
        value = anls(a, b)
        assert value == pytest.approx(1 - share if share < 0.5 else 0)
        seen.add(value > 0)
    assert seen == {True, False}


@pytest.mark.parametrize(
    "question", [QUESTION, "What?\n(A) a red circle\n(B) a dog\n(C) nothing", "What? (A) a red circle (B) a dog (C) nothing"]
)
def test_options_of_a_question(question):
    options = options_of(question)
    assert options is not None
    assert options.texts == ("a red circle", "a dog", "nothing")
    assert options.stem.endswith("?")


def test_texts_that_are_not_options():
    assert options_of("What is shown?") is None
    assert options_of("A. only one") is None
    assert options_of("B. one\nC. two") is None


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("(b)", None), ("B.", "B"), ("(B) a dog", "B"), ("A dog.", "B"), ("a dog", "B"), ("The answer is C", "C"), ("D", None)]
    + [("A dog and more", None), ("", None), ("A: a dog", "A")],
)
def test_the_option_that_an_answer_names(answer, letter):
    assert chosen(answer, options_of(QUESTION)) == letter
    assert choice(answer, "B", QUESTION) == float(letter == "B")
    assert choice(answer, "a dog", QUESTION) == float(letter == "B")


def test_an_answer_rephrased_for_every_option():
    options = Options("?", ("a dog", "B minor", "x"))
    assert rephrased("B", options) == ["A", "B", "C"]
    assert rephrased("(B) B minor", options) == ["(A) a dog", "(B) B minor", "(C) x"]
    assert rephrased("a dog", options) == ["a dog", "B minor", "x"]
    assert rephrased("Answer: A.", options) == ["Answer: A.", "Answer: B.", "Answer: C."]
    assert rephrased("a cat", options) is None


def test_rotated_options_are_one_question_that_is_right_only_if_all_are():
    texts = ["cat", "dog", "cow"]
    answers = []
    for turn in range(3):
        rotated = texts[turn:] + texts[:turn]
        question = "What is it?\n" + "\n".join(f"{letter}. {text}" for letter, text in zip("ABC", rotated))
        right = "ABC"[rotated.index("dog")]
        answers.append(Answer("s", turn + 1, question, right, right, "A", medium="v.mp4", metric="choice"))
    assert score_of(answers)[:3] == (1, 1.0, 0.0)
    assert score_of([answers[0], answers[1], answers[2]._replace(given="B")])[:2] == (1, 0.0), "B is another option there"
    other = [answer._replace(medium="w.mp4", given="A") for answer in answers]
    assert score_of([*answers, *other])[:2] == (2, 0.5)
    assert score_of([answer._replace(metric="exact") for answer in answers])[0] == 3
