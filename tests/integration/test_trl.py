"""TRL: one step of supervised fine-tuning, DPO and GRPO trains the model."""

import pytest

from tests.support.trl_steps import ARGUMENTS, answers, steps

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PROMPT = [{"role": "user", "content": "What is the colour of the shape?"}]


def untouched(names):
    """Parameters that a step over text cannot change are those of the vision tower and the connector."""
    return [name for name in names if not name.startswith(("vision_model.", "mlp1.")) and not name.endswith("k_proj.bias")]


@pytest.mark.parametrize("data", ["text", "messages", "completion"])
def test_supervised(make_model, tokenizer, tmp_path, data):
    """SFTTrainer with its defaults (activation checkpointing on); its loss is the model's own."""
    rows = {
        "text": {"text": ["The answer is blue.", "Is there a red circle?"]},
        "messages": {"messages": [PROMPT + answer for answer in answers("The answer is blue.", "red")]},
        "completion": {"prompt": [PROMPT] * 2, "completion": answers("The answer is blue.", "red")},
    }[data]
    model = make_model()
    arguments = trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS)
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = make_model()(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}).loss
    log, same = steps(trainer, model)
    assert log[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert untouched(same) == []


def test_supervised_on_answers_only(make_model, tokenizer, tmp_path):
    """The chat template marks answers, so that TRL masks the rest."""
    rows = {"messages": [PROMPT + answer for answer in answers("The answer is blue.", "red")]}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, **ARGUMENTS)
    model = make_model()
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    kept = sorted(tokenizer.decode(row[row != -100]) for row in labels)
    assert kept == ["The answer is blue.<|im_end|>", "red<|im_end|>"]
    _, same = steps(trainer, model)
    assert untouched(same) == []


def test_supervised_with_images(make_model, make_batch, tokenizer, tmp_path):
    """SFTTrainer with a collator of its own, as vision-language models are trained."""
    model = make_model()
    rows = [{"row": index} for index in range(2)]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, **ARGUMENTS
    )
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        data_collator=lambda rows: make_batch(),
    )  # fmt: skip
    log, same = steps(trainer, model)
    assert log[0]["loss"] == pytest.approx(make_model()(**make_batch()).loss.item(), rel=1e-3)
    assert [name for name in same if not name.endswith("k_proj.bias")] == []


def test_supervised_with_adapters(make_model, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    rows = {"text": ["The answer is blue.", "Is there a red circle?"]}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS)
    targets = r"language_model.*_proj"
    trainer = trl.SFTTrainer(
        make_model(), args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
    )  # fmt: skip
    _, same = steps(trainer, trainer.model)
    assert same == []


def test_from_a_folder(folder, tokenizer, tmp_path):
    """TRL finds the class of a saved folder by itself."""
    rows = {"text": ["The answer is blue.", "Is there a red circle?"]}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS)
    trainer = trl.SFTTrainer(str(folder), args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer)
    log, _ = steps(trainer, trainer.model)
    assert log[0]["loss"] > 0


def test_preferences(make_model, tokenizer, tmp_path):
    """DPOTrainer: the loss of the first step is log 2, since the policy is still its reference."""
    rows = {"prompt": [PROMPT] * 2, "chosen": answers("The answer is blue.", "blue"), "rejected": answers("red", "Is there a circle?")}
    model = make_model()
    model.config._name_or_path = ""
    arguments = trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS)
    trainer = trl.DPOTrainer(
        model, ref_model=make_model(), args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer
    )
    log, same = steps(trainer, model)
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert untouched(same) == []


def test_preferences_of_a_loaded_model(folder, tokenizer, tmp_path):
    """DPOTrainer makes the reference model itself, from the folder that the model was loaded from."""
    from eagle_model import EagleForConditionalGeneration

    rows = {"prompt": [PROMPT] * 2, "chosen": answers("The answer is blue.", "blue"), "rejected": answers("red", "Is there a circle?")}
    model = EagleForConditionalGeneration.from_pretrained(folder)
    arguments = trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer)
    log, _ = steps(trainer, model)
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_policy_gradient(make_model, tokenizer, tmp_path):
    """GRPOTrainer samples answers with `generate` and trains on their rewards."""
    model = make_model()
    arguments = trl.GRPOConfig(output_dir=str(tmp_path), num_generations=2, max_completion_length=6, **ARGUMENTS)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": [PROMPT] * 2}),
        processing_class=tokenizer,
    )
    log, same = steps(trainer, model)
    assert log[0]["completions/mean_length"] > 0
    assert untouched(same) == []
