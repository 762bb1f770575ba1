"""Answers are compared by exact match; the text-only answer is the most frequent one; batches change no answer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from eagle_model import EagleForConditionalGeneration, EagleProcessor, preset
from eagle_train.cli.chat import converse
from eagle_train.config import Source, dump_config, load_config
from eagle_train.data.prepare import prepare
from eagle_train.data.sample import load_sample
from eagle_train.distributed.sharding import is_sharded
from eagle_train.distributed.world import start_world
from eagle_train.evaluation import text_only
from eagle_train.evaluation.metrics import Answer, Evaluation
from eagle_train.evaluation.options import normalised
from eagle_train.evaluation.text_only import Frequencies, TextOnlyBaseline, last_question, question_text, training_pairs
from eagle_train.runs.chat import Chat
from eagle_train.runs.evaluate import Evaluator
from eagle_train.runs.export import export
from eagle_train.runs.exported import evaluate_exported
from eagle_train.runs.folder import open_run
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train


def test_normalised_forgives_case_spacing_and_outer_punctuation():
    assert normalised("  Red  Circle. ") == normalised("red circle")
    assert normalised("red, blue") != normalised("red blue")
    assert normalised("3.5") == "3.5"


def test_questions_lose_their_placeholders():
    assert question_text("<image>\nwhat color?") == "what color?"
    assert question_text("<video-2> first, then <image-1> what?") == "first, then what?"


def test_text_only_answers_are_the_most_frequent(monkeypatch):
    pairs = [("q", "a"), ("q", "b"), ("q", "b"), ("r", "c"), ("r", "c"), ("r", "c")]
    frequencies = Frequencies.count(pairs, {"q", "r", "not in training"})
    assert [frequencies.answer(text) for text in ("q", "r", "not in training")] == ["b", "c", "c"]
    assert Frequencies.count(pairs, {"r"}) == ({"q": "b", "r": "c"}, "c", True)
    monkeypatch.setattr(text_only, "MOST_KEPT", 1)
    assert Frequencies.count(pairs, {"r"}) == ({"r": "c"}, "c", False), "of too many, only the questions that are evaluated are kept"
    assert Frequencies.count(pairs, {"q", "r"}) == ({"q": "b", "r": "c"}, "c", False)
    with pytest.raises(text_only.TooManyAnswersError):
        Frequencies.count(pairs, None)
    assert Frequencies.count((), {"q"}).answer("q") == ""


@pytest.mark.parametrize(("kept", "readings"), [(9, 1), (1, 2)])
def test_training_rows_are_read_once_unless_they_are_many(monkeypatch, kept, readings):
    read = []

    def pairs(facts):
        read.append(facts)
        return [("q", "a"), ("q", "b"), ("q", "b"), ("r", "c")]

    monkeypatch.setattr(text_only, "MOST_KEPT", kept)
    monkeypatch.setattr(text_only, "training_pairs", pairs)
    baseline = TextOnlyBaseline(None)
    asked = lambda *texts: Evaluation(tuple(Answer("s", row, text, "", "") for row, text in enumerate(texts)), 0.0)
    found = [baseline._filled(asked(*texts)) for texts in (["q"], ["q"], ["q", "r", "new"], ["r"])]
    assert [[answer.text_only for answer in one.answers] for one in found] == [["b"], ["b"], ["b", "c", "b"], ["c"]]
    assert len(read) == readings


@pytest.mark.parametrize("dies", [False, True])
def test_many_training_rows_are_read_by_another_process(tmp_path, make_config, write_jsonl, tokenizer, monkeypatch, dies):
    """What fails there is done here."""
    talk = lambda question, answer: {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    write_jsonl(tmp_path / "rows.jsonl", [talk("q", "a"), talk("q", "so b"), talk("q", "b"), talk("r", "c")])
    facts = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).facts
    monkeypatch.setattr(text_only, "IN_BACKGROUND_FROM", 4)
    baseline, read, count = TextOnlyBaseline(facts, "so "), [], text_only.count_answers
    baseline.count_in_background()
    monkeypatch.setattr(text_only, "count_answers", lambda *given: read.append(given[2]) or count(*given))
    if dies:
        baseline._counting.close()
    filled = baseline._filled(Evaluation(tuple(Answer("s", row, text, "", "") for row, text in enumerate(["q", "r", "new"])), 0.0))
    assert [answer.text_only for answer in filled.answers] == ["b", "c", "b"]
    assert read == ([{"q", "r", "new"}] if dies else [])


def test_training_pairs_are_posed_as_evaluation_poses_them(tmp_path, make_config, write_jsonl, tokenizer, picture):
    """Whatever the spelling of the row: content parts too, and the text of a tool is not a question."""
    (tmp_path / "a.png").write_bytes(picture())
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What colour?"}]
    plain = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    tool = [{"from": "observation", "value": "42"}, {"from": "gpt", "value": "as before"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    rows = [{"messages": [{"role": "user", "content": parts}, answer]}, {"image": "a.png", "conversations": plain + tool}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    facts = prepare(make_config({"s": {"annotation": "rows.jsonl"}}, prompt={"system": "Be brief."}), tokenizer).facts
    pairs = list(training_pairs(facts))
    assert pairs == [("What colour?", "red"), ("What colour?", "red"), ("What colour?", "as before")]
    question = last_question(load_sample(facts.address(0)).messages[:-1])
    assert Frequencies.count(pairs, {question}).answer(question) == "red"


def test_scores_count_what_has_no_answer_as_wrong():
    answers = [
        Answer("a", 1, "q", "yes", "Yes", "no"),
        Answer("a", 2, "q", "no", "yes", "no"),
        Answer("b", 3, "q", "", "", problem="gone"),
    ]
    result = Evaluation(tuple(answers), 1.0)
    assert result.score()[:3] == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert result.by_source()["b"].accuracy == 0.0


def test_only_what_stands_behind_the_reasons_is_compared(colour_run, tmp_path, write_jsonl, monkeypatch):
    """Of generated answers, of expected ones, and of the training answers that the text-only baseline counts."""

    def row(number, answer):
        talk = [{"from": "human", "value": "<image>is it red?"}, {"from": "gpt", "value": answer}]
        return {"image": f"{number}.png", "conversations": talk}

    write_jsonl(tmp_path / "train.jsonl", [row(0, "it is red, so yes"), row(1, "it is green, so no"), row(2, "it is blue, so no")])
    write_jsonl(tmp_path / "held_out.jsonl", [row(0, "it is red, so yes"), row(1, "no")])
    data = {"sources": {"t": {"annotation": "train.jsonl"}}, "eval_sources": {"h": {"annotation": "held_out.jsonl"}}, "workers": 1}
    config = colour_run(data=data, eval={"answer_after": "so ", "loss": False})
    shortest_first = ["so it is blue, so no", "it is red, so yes"]
    monkeypatch.setattr("eagle_train.evaluation.evaluate.generate", lambda *_, **__: shortest_first)
    world = start_world(config.parallel, "cpu")
    ready = get_ready(config)
    done = Evaluator(ready, world).evaluate(torch.nn.Linear(1, 1), 1)
    assert [(one.reasons, one.given, one.expected, one.text_only, one.right) for one in done.answers] == [
        ("it is red, so ", "yes", "yes", "no", True),
        ("so it is blue, so ", "no", "no", "no", True),
    ]


@pytest.fixture
def tiny_folder(tmp_path, tokenizer):
    """A released model with random weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = preset("tiny", tokenizer=tokenizer)
    EagleForConditionalGeneration(config).save_pretrained(tmp_path / "tiny")
    EagleProcessor.for_config(tokenizer, config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def run(colour_run, tmp_path, write_jsonl):
    """A run that was trained a little, with held-out rows of all kinds: fine, gone, too long."""
    held_out = [
        {"image": f"{index}.png", "conversations": [{"from": "human", "value": "<image>what color?"}, {"from": "gpt", "value": name}]}
        for index, name in enumerate(["red", "green", "blue", "red", "green"])
    ]
    held_out.append({"conversations": [{"from": "human", "value": "x" * 5000}, {"from": "gpt", "value": "red"}]})
    write_jsonl(tmp_path / "held_out.jsonl", held_out)
    stages = [{"name": "s", "max_tokens": 1280, "steps": 3, "packs_per_step": 1, "lr": 3e-3}]
    config = colour_run(
        data={"sources": {"rows": {"annotation": "rows.jsonl"}}, "eval_sources": {"held": {"annotation": "held_out.jsonl"}}, "workers": 1},
        eval={"batch_size": 3, "max_new_tokens": 4, "every": 2},
        stages=stages,
    )
    return config


def test_a_run_is_evaluated_exported_and_chatted_with(run, tmp_path):
    torch.set_num_threads(1)
    world = start_world(run.parallel, "cpu")
    ready = get_ready(run)
    assert next(training_pairs(ready.facts)) == ("what color?", "red")
    records = []
    trained = train(ready, world, on_record=records.append)
    model = trained.trainer.model
    evaluations = [record for record in records if record["kind"] == "eval"]
    assert [record["total_step"] for record in evaluations] == [2]
    assert evaluations[0]["scores"]["held"]["questions"] == 6
    (tmp_path / "3.png").rename(tmp_path / "elsewhere.png")
    together = Evaluator(ready, world).evaluate(model, 3)
    assert [answer.line for answer in together.answers] == [1, 2, 3, 4, 5, 6]
    assert [bool(answer.problem) for answer in together.answers] == [False, False, False, True, False, True]
    assert "3.png" in together.answers[3].problem
    (tmp_path / "elsewhere.png").rename(tmp_path / "3.png")
    one_by_one = replace(ready, config=run.replaced(eval=run.eval.replaced(batch_size=1)))
    alone = Evaluator(one_by_one, world).evaluate(model, 3)
    assert [answer.text_only for answer in alone.answers] == ["red"] * 6, "the most frequent training answer, read once"
    for number in (0, 1, 2, 4):
        assert alone.answers[number] == together.answers[number]
    assert len(alone.write(run.run.folder / "answers.jsonl").read_text().splitlines()) == 6

    # The same answer from a chat with the run, and with what it exports, wherever the folder is moved.
    image = tmp_path / "1.png"
    expected = alone.answers[1].given
    moved = tmp_path / "moved"
    shutil.move(run.run.folder, moved)
    assert Chat.open(moved, images=[image], max_new_tokens=4, device="cpu").answer("what color?") == expected
    export(open_run(moved), tmp_path / "model", dtype="float32")
    chat = Chat.open(tmp_path / "model", images=[image], max_new_tokens=4, device="cpu")
    assert chat.answer("what color?") == expected
    chat.answer("are you sure?")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        Chat.open(moved, images=[tmp_path / "nothing.png"])

    # An exported folder gives the answers of the run.
    held = Source(annotation=ready.eval_facts.sources[0].annotation)
    overrides = ["eval.max_new_tokens=4"]
    [point], facts = evaluate_exported(tmp_path / "model", held, tmp_path / "evaluation", world, overrides=overrides)
    exported = point.evaluation
    assert [row["text_only"] for row in point.rows()] == [None], "no training rows, no baseline"
    assert len(facts) == len(ready.eval_facts)
    for ours, theirs in zip(exported.answers, alone.answers, strict=True):
        assert (ours.line, ours.question, ours.expected, ours.problem) == (theirs.line, theirs.question, theirs.expected, theirs.problem)
        assert ours.given == theirs.given


def test_later_questions_add_media_and_a_failed_one_changes_nothing(tmp_path, tiny_folder, capsys):
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    chat = Chat.open(tiny_folder, images=[tmp_path / "0.png"], device="cpu", max_new_tokens=2, system="Be brief.", max_tiles=1)
    seen = []
    process = chat.processor.process
    chat.processor.process = lambda *given, **options: seen.append((given, options)) or process(*given, **options)
    questions = [
        "What is this?",
        "/image nothing.png",
        f"/image {tmp_path / '1.png'}",
        "And this?",
        f"/image {tmp_path / 'bad.png'}",
        "And this one?",
        "What is in <video>?",
        f"/image {tmp_path / '2.png'}",
        "Is <image-3> darker than <image-1>?",
    ]
    converse(chat, iter(questions))
    printed = capsys.readouterr()
    assert "/image: nothing.png: there is no such file" in printed.err
    assert "bad.png" in printed.err
    assert printed.err.count("error: ") == 2
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == [
        "What is this?",
        "<image-2>And this?",
        "What is in <video>?",  # text: the conversation has no video
        "Is <image-3> darker than <image-1>?",
    ]
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(FileNotFoundError, match="addresses are not read; download the file and name it"):
        chat.answer("And this?", images=[Path("https://example.org/cat.jpg")])
    assert chat.images == [str(tmp_path / f"{number}.png") for number in range(3)]
    assert all(options["max_tiles"] == 1 for _, options in seen)


def test_a_sharded_model_is_evaluated_before_it_is_trained(colour_run):
    """Generated answers come first in the process: of a complete run, and of one that was killed before an evaluation."""
    rows = {"rows": {"annotation": "rows.jsonl"}}
    config = colour_run(
        data={"sources": rows, "eval_sources": rows, "workers": 1},
        eval={"limit": 2, "max_new_tokens": 4},
        stages=[{"name": name, "max_tokens": 1280, "steps": 2, "packs_per_step": 1} for name in ("short", "longer")],
        parallel={"dtype": "bfloat16"},
        checkpoint={"keep": 9},
    )
    world = start_world(config.parallel, "cpu")
    first = train(get_ready(config), world)
    assert is_sharded(first.trainer.model)
    complete = train(get_ready(config), world)
    assert complete.final_evaluation() is not None
    complete.check_evaluations()
    for folder in (config.run.folder / "checkpoints").glob("longer-*"):
        shutil.rmtree(folder)
    metrics = config.run.folder / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if json.loads(line)["kind"] != "eval"))
    train(get_ready(config), world).check_evaluations()
    kinds = [json.loads(line)["kind"] for line in metrics.open() if json.loads(line)["kind"] in ("step", "eval", "eval_failed")]
    assert kinds == ["step", "step", "eval", "step", "step", "eval"]


def test_temperature_samples(tiny_folder):
    torch.manual_seed(0)
    answers = {Chat.open(tiny_folder, device="cpu", max_new_tokens=8, temperature=50.0).answer("hi") for _ in range(3)}
    assert len(answers) > 1
    assert len({Chat.open(tiny_folder, device="cpu", max_new_tokens=8).answer("hi") for _ in range(2)}) == 1


def test_a_run_that_moved_with_its_project_is_the_same_run(colour_run_in, tmp_path):
    (tmp_path / "there").mkdir()
    held_out = {"held": {"annotation": "rows.jsonl"}}
    sources = {"rows": {"annotation": "rows.jsonl"}}
    stages = [{"name": "s", "max_tokens": 640, "steps": 1, "packs_per_step": 1}]
    options = {"data": {"sources": sources, "eval_sources": held_out, "workers": 1}, "stages": stages, "eval": {"limit": 2}}
    config = colour_run_in(tmp_path / "there", **options)
    world = start_world(config.parallel, "cpu")
    train(get_ready(config), world)
    here = tmp_path / "here"
    (tmp_path / "there").rename(here)
    moved = open_run(here / "runs" / "run")
    assert len(get_ready(moved).eval_facts) == 25
    # What the user wrote lies where it lay to the run, so training goes on (and has nothing left to do).
    train(get_ready(colour_run_in(here, **options)), world)
    # One that starts from an export of the first, and then is all that is left.
    export(moved, here / "model", dtype="float32")
    from_export = here / "run.yaml"
    from_export.write_text(dump_config(colour_run_in(here, **options, run={"name": "second"}, model={"path": "model"})))
    train(get_ready(load_config(from_export)), world)
    left = tmp_path / "left"
    (here / "runs" / "second").rename(left)
    shutil.rmtree(here)
    export(open_run(left), tmp_path / "again", dtype="float32")
    answers = [Chat.open(folder, max_new_tokens=2, device="cpu").answer("?") for folder in (left, tmp_path / "again")]
    assert answers[0] == answers[1]
