"""Teacher-forced scores against the logits of each row alone, whatever the packs; metrics and validation losses that follow from them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_model.language.head import Head, token_scores
from eagle_model.prompt import IGNORE_INDEX, CachedEncoder
from eagle_train.config import ConfigError
from eagle_train.data.sample import load_sample
from eagle_train.distributed.world import alone
from eagle_train.errors import EvaluationError
from eagle_train.evaluation.evaluate import evaluate
from eagle_train.evaluation.teacher_forced import Variant, score_variants
from eagle_train.loading.pack import load_pack
from eagle_train.planning.stages import Planned
from eagle_train.planning.visual import plan_visual, sample_plan
from eagle_train.runs.ready import get_ready
from eagle_train.training.build import build_model

OPTIONS = "<image>what color?\nA. red\nB. green\nC. blue"


@pytest.fixture
def ready(colour_run, tmp_path, write_jsonl):
    """A run with held-out rows: of two turns, of options, one that is gone, one that is too long."""
    colours = ["red", "green", "blue"]
    turns = [("<image>what color?", None), ("are you sure?", "yes")]
    rows, choices = [], []
    for index in range(6):
        answers = [colours[index % 3], "yes"]
        rows.append({"image": f"{index}.png", "conversations": conversation([q for q, _ in turns], answers)})
        letter = "ABC"[index % 3]
        answer = letter if index < 3 else f"{letter}. {colours[index % 3]}"
        choices.append({"image": f"{index}.png", "conversations": conversation([OPTIONS], [answer])})
    rows.append({"conversations": conversation(["x" * 5000], ["red"])})
    Image.new("RGB", (32, 32)).save(tmp_path / "gone.png")
    rows.append({"image": "gone.png", "conversations": conversation(["<image>?"], ["black"])})
    write_jsonl(tmp_path / "held_out.jsonl", rows)
    write_jsonl(tmp_path / "choices.jsonl", choices)
    names = ("held_out", "choices")
    config = colour_run(
        data={
            "sources": {"rows": {"annotation": "rows.jsonl"}},
            "eval_sources": {name: {"annotation": f"{name}.jsonl"} for name in names},
            "workers": 1,
        },
        eval={"batch_size": 4, "max_new_tokens": 2, "metrics": {"held_out": "teacher_forced", "choices": "likelihood"}},
    )
    ready = get_ready(config)
    (tmp_path / "gone.png").unlink()
    return ready


def conversation(questions, answers):
    turns = []
    for question, answer in zip(questions, answers):
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


@pytest.fixture
def model(ready):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return build_model(ready.config, ready.tokenizer).eval()


def reference(model, ready, row, answer=None):
    """[turns, (loss, tokens, right)] of a row alone, from its logits in padded mode."""
    facts, encoder = ready.eval_facts, CachedEncoder(ready.tokenizer)
    plan = sample_plan(facts, plan_visual(facts, 1280, ready.spec), row, ready.spec)
    plan = type(plan)(plan.tokens + 100, plan.grids, plan.sizes, plan.videos)

    def change(_, sample):
        if answer is not None:
            sample.messages[-1]["content"] = answer
        return sample

    batch = load_pack([Planned(facts.address(row), plan)], encoder, ready.spec, change=change).batch
    with torch.no_grad():
        tiles = torch.from_numpy(batch.tiles) if len(batch.tiles) else None
        logits = model(input_ids=torch.from_numpy(batch.input_ids)[None], pixel_values=tiles).logits[0].double()
    turns = [[0.0, 0, 0]]
    previous = False
    for place, target in enumerate(batch.targets.tolist()):
        labelled = target != IGNORE_INDEX
        if labelled and not previous:
            turns.append([0.0, 0, 0])
        if labelled:
            turns[-1][0] += float(logits[place].logsumexp(0) - logits[place, target])
            turns[-1][1] += 1
            turns[-1][2] += int(logits[place].argmax() == target)
        previous = labelled
    return turns[1:]


def test_scores_of_tokens_are_those_of_the_logits():
    torch.manual_seed(0)
    head, hidden = Head(8, 11, bias=False), torch.randn(30, 8)
    targets = torch.randint(0, 11, (30,))
    targets[::4] = IGNORE_INDEX
    logits = head(hidden).double()
    targets[1] = logits[1].argmax()
    for rows in (1, 7, 512):
        losses, right = token_scores(head, hidden, targets, rows=rows)
        kept = targets != IGNORE_INDEX
        torch.testing.assert_close(losses[kept].double(), -logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None])[:, 0])
        assert torch.equal(right, (logits.argmax(-1) == targets) & kept)
        assert right[1]
        assert not losses[~kept].any()
    losses, right = token_scores(head, hidden, torch.full((30,), IGNORE_INDEX))
    assert not losses.any()
    assert not right.any()


@pytest.mark.parametrize("capacity", [1, 200, 4000])
def test_scores_do_not_depend_on_the_packs(ready, model, capacity):
    facts = ready.eval_facts
    plans = plan_visual(facts, 1280, ready.spec)
    variants = [Variant(row) for row in range(len(facts))] + [Variant(8, "B. a longer answer than the planned one"), Variant(0, "no")]
    scores = score_variants(model, ready.tokenizer, facts, plans, variants, ready.config, alone("cpu"), ready.spec, capacity=capacity)
    assert set(variants) - set(scores) == {Variant(6), Variant(7)}, "the row that is too long and the one whose image is gone"
    for variant, turns in scores.items():
        expected = reference(model, ready, variant.row, variant.answer)
        assert len(turns) == len(expected) == (1 if variant.row > 7 else 2)
        for turn, (loss, tokens, right) in zip(turns, expected):
            assert turn.loss == pytest.approx(loss, rel=1e-5)
            assert (turn.tokens, turn.right) == (tokens, right)


def test_evaluation_by_scores(ready, model, tmp_path):
    """The metrics teacher_forced and likelihood, and validation losses, from a model whose head prefers what its answers hold."""
    facts = ready.eval_facts
    done = evaluate(model, ready.tokenizer, facts, ready.config, alone("cpu"), ready.spec)
    alone_scores = {row: reference(model, ready, row) for row in range(len(facts)) if row not in (6, 7)}
    for name, rows in (("held_out", range(6)), ("choices", range(8, 14))):
        turns = [turn for row in rows for turn in alone_scores[row]]
        loss = done.losses[name]
        assert loss.loss == pytest.approx(sum(turn[0] for turn in turns) / sum(turn[1] for turn in turns), rel=1e-5)
        assert loss[3:] == (sum(turn[1] for turn in turns), len(turns), 6)
        assert loss.token_accuracy == pytest.approx(sum(turn[2] for turn in turns) / loss.tokens)
    held_out, choices = done.answers[:8], done.answers[8:]
    assert [answer.value for answer in held_out[:6]] == [float(alone_scores[row][-1][2] == alone_scores[row][-1][1]) for row in range(6)]
    assert [bool(answer.problem) for answer in held_out] == [False] * 6 + [True] * 2
    for row, answer in enumerate(choices, 8):
        texts = list("ABC") if row < 11 else ["A. red", "B. green", "C. blue"]
        losses = [reference(model, ready, row, text)[-1][0] for text in texts]
        assert answer.given == texts[int(np.argmin(losses))]
        assert answer.right == (answer.given == answer.expected)
    lines = [json.loads(line) for line in done.write(tmp_path / "answers.jsonl", frames=16).read_text().splitlines()]
    assert [line["score"] for line in lines] == [answer.score for answer in done.answers]
    assert {line["frames"] for line in lines} == {16}
    off = ready.config.replaced(eval=ready.config.eval.replaced(loss=False))
    without = evaluate(model, ready.tokenizer, facts, off, alone("cpu"), ready.spec)
    assert (without.losses, without.answers) == ({}, done.answers)


def test_a_right_model_is_scored_as_right(ready, model):
    """Weights for which every label is the most likely token: the loss is near 0 and every turn is right."""
    sample = load_sample(ready.eval_facts.address(0))
    assert sample.messages[-1]["content"] == "yes"
    wanted = ready.tokenizer("yes", add_special_tokens=False).input_ids

    def answer_yes(module, inputs, output):
        # 'y', 'e', 's', <|im_end|> follow each other, and anything else is followed by 'y'.
        ids = inputs_of["ids"]
        chain = dict(zip(wanted, [*wanted[1:], ready.tokenizer.convert_tokens_to_ids("<|im_end|>")]))
        made = torch.zeros(len(ids), output.shape[-1])
        for place, token in enumerate(ids.tolist()):
            made[place, chain.get(token, wanted[0])] = 20.0
        return made[inputs_of["rows"]]

    inputs_of = {}
    model.language_model.lm_head.register_forward_hook(answer_yes)

    def note(module, inputs):
        inputs_of["ids"] = inputs[0].input_ids
        inputs_of["rows"] = (inputs[0].targets != IGNORE_INDEX).nonzero().squeeze(1)

    model.register_forward_pre_hook(note)
    turns = score_variants(
        model,
        ready.tokenizer,
        ready.eval_facts,
        plan_visual(ready.eval_facts, 1280, ready.spec),
        [Variant(0)],
        ready.config,
        alone("cpu"),
        ready.spec,
        capacity=1280,
    )[Variant(0)]
    assert turns[1].right == turns[1].tokens == len(wanted) + 1
    assert turns[1].loss < 1e-3
    assert turns[0].right < turns[0].tokens
    assert turns[0].loss > 10


def test_metrics_that_do_not_fit_are_errors(ready, model):
    def evaluate_with(**metrics):
        config = ready.config.replaced(eval=ready.config.eval.replaced(metrics=metrics))
        return evaluate(model, ready.tokenizer, ready.eval_facts, config, alone("cpu"), ready.spec)

    with pytest.raises(ConfigError, match="names other, but the held-out sources are held_out, choices"):
        evaluate_with(other="exact")
    with pytest.raises(ConfigError, match=r"eval\.judge\.base_url"):
        evaluate_with(choices="judge")
    with pytest.raises(EvaluationError, match=r"held_out:1: the metric likelihood needs a question with options"):
        evaluate_with(held_out="likelihood", choices="teacher_forced")
