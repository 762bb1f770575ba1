"""TRL with model and processor: SFTTrainer, DPOTrainer and GRPOTrainer train one step on images, with their own collators."""

import pytest
import torch

from eagle_model import EagleForConditionalGeneration, EagleProcessor
from eagle_model.visual import BudgetError
from tests.support.media import random_image
from tests.support.trl_steps import ARGUMENTS, answers, steps

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def processor(tokenizer, make_model):
    return EagleProcessor.for_config(tokenizer, make_model().config, max_tiles=4, thumbnail=True)


#: Of one, three and four tiles with thumbnails, so that counts of images and of tiles differ.
PICTURES = [random_image(1, (30, 30)), random_image(2, (70, 34)), random_image(3, (34, 110))]
QUESTIONS = ["What is it?", "Is there a red circle in the image?", "What is the colour of the shape?"]


def image_rows(count, **columns):
    """A dataset of `count` rows with an image each, decoded by `datasets` as it decodes files."""
    rows = {"images": [[picture] for picture in PICTURES[:count]], **columns}
    return datasets.Dataset.from_dict(rows).cast_column("images", datasets.Sequence(datasets.Image()))


def asked(question):
    return [{"role": "user", "content": question}]


def whole_loss(make_model, processor, labels="assistant"):
    """The model's own loss on the rows as Eagle's processor makes them. labels: of the assistant, the completion, or all but padding."""
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}, *answer]
        for picture, question, answer in zip(PICTURES, QUESTIONS, answers("The answer is blue.", "red"))
    ]
    inputs = processor(messages=talks, return_labels=True, padding_side="right")
    if labels == "completion":  # TRL also learns the line break after <|im_end|>
        rows, places = torch.arange(2), (inputs["labels"] != -100).long().cumsum(1).argmax(1) + 1
        inputs["labels"][rows, places] = inputs["input_ids"][rows, places]
    if labels == "all":
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return make_model()(**inputs).loss.item()


@pytest.mark.parametrize("data", ["messages", "completion", "text"])
def test_supervised_with_model_and_processor(make_model, processor, tmp_path, data):
    """SFTTrainer with its own collator for images: the loss is the model's, and every part is trained."""
    talks = [asked(question) + answer for question, answer in zip(QUESTIONS, answers("The answer is blue.", "red"))]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": f"<image-1>{question}"}, *answer])
        for question, answer in zip(QUESTIONS, answers("The answer is blue.", "red"))
    ]
    columns = {
        "messages": {"messages": talks},
        "completion": {"prompt": [talk[:1] for talk in talks], "completion": [talk[1:] for talk in talks]},
        "text": {"text": texts},
    }[data]
    model = make_model()
    # Without this TRL 1.16 removes the column of texts where there are images.
    arguments = trl.SFTConfig(output_dir=str(tmp_path), remove_unused_columns=data != "text", **ARGUMENTS)
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=image_rows(2, **columns), processing_class=processor)
    log, same = steps(trainer, model)
    expected = whole_loss(make_model, processor, "completion" if data == "completion" else "all")
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert [name for name in same if not name.endswith("k_proj.bias")] == []


def test_supervised_on_answers_only_with_processor(make_model, processor, tmp_path):
    rows = image_rows(2, messages=[asked(q) + a for q, a in zip(QUESTIONS, answers("The answer is blue.", "red"))])
    arguments = trl.SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, **ARGUMENTS)
    model = make_model()
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=processor)
    log, _ = steps(trainer, model)
    assert log[0]["loss"] == pytest.approx(whole_loss(make_model, processor), rel=1e-3)


def test_a_prompt_beyond_max_length_is_said(make_model, processor, tmp_path):
    rows = image_rows(1, messages=[asked("What? " * 60) + answers("red")[0]])
    arguments = trl.SFTConfig(output_dir=str(tmp_path), max_length=40, **ARGUMENTS)
    trainer = trl.SFTTrainer(make_model(), args=arguments, train_dataset=rows, processing_class=processor)
    with pytest.raises(BudgetError, match="40 tokens"):
        trainer.train()


def test_preferences_with_images(make_model, processor, tmp_path):
    rows = image_rows(
        2, prompt=[asked(q) for q in QUESTIONS[:2]], chosen=answers("The answer is blue.", "blue"), rejected=answers("red", "Is there?")
    )
    model = make_model()
    arguments = trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS)
    trainer = trl.DPOTrainer(model, ref_model=make_model(), args=arguments, train_dataset=rows, processing_class=processor)
    log, same = steps(trainer, model)
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert [name for name in same if not name.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_policy_gradient_with_images(folder, processor, tmp_path, beta):
    """Prompts of different lengths and images of different numbers of tiles. beta: with a reference model, which TRL loads itself."""
    model = EagleForConditionalGeneration.from_pretrained(folder)
    batch = ARGUMENTS | {"gradient_accumulation_steps": 2}
    arguments = trl.GRPOConfig(output_dir=str(tmp_path), num_generations=2, max_completion_length=4, beta=beta, **batch)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
        args=arguments,
        train_dataset=image_rows(3, prompt=[asked(question) for question in QUESTIONS]),
        processing_class=processor,
    )
    log, same = steps(trainer, model)
    assert log[0]["completions/mean_length"] > 0
    assert ("kl" in log[0]) == (beta > 0)
    assert [name for name in same if not name.endswith("k_proj.bias")] == []
