"""transformers' Trainer: gradient accumulation, evaluation, activation checkpointing and adapters."""

import pytest
import torch

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments


class Rows(torch.utils.data.Dataset):
    """Rows of one tile each; with other numbers of labels, so that means of microbatches are not the mean of a step."""

    def __init__(self, make_batch, count):
        self.rows = []
        for seed in range(count):
            row = make_batch(rows=1, seed=seed)
            row["labels"][:, : 9 + seed % 5] = -100
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def trainer_of(model, rows, folder, **options):
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "remove_unused_columns": False, "seed": 0, "optim": "sgd", "logging_steps": 1,
        "lr_scheduler_type": "constant", "disable_tqdm": True, "dataloader_pin_memory": False,
    } | options  # fmt: skip
    return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=rows, eval_dataset=rows, data_collator=collate)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_steps_equal_large_ones(make_model, make_batch, tmp_path, checkpointing):
    """4 microbatches of 1 row give the weights and the losses of 1 batch of 4 rows."""
    rows = Rows(make_batch, 8)
    results = []
    for size, accumulate in ((4, 1), (1, 4)):
        model = make_model()
        trainer = trainer_of(
            model, rows, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train()
        assert trainer.model_accepts_loss_kwargs
        results.append((losses(trainer), {name: p.detach().clone() for name, p in model.named_parameters()}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    start = dict(make_model().named_parameters())
    for name, parameter in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], parameter, atol=1e-5, rtol=1e-4, msg=name)
        # The bias of keys cancels in the softmax.
        assert name.endswith("k_proj.bias") or not torch.equal(parameter, start[name]), f"{name} was not trained"


def test_evaluation_and_prediction(make_model, make_batch, tmp_path):
    rows = Rows(make_batch, 4)
    model = make_model()
    trainer = trainer_of(model, rows, tmp_path, per_device_eval_batch_size=4)
    expected = model(**collate(rows.rows))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    prediction = trainer.predict(rows)
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits.detach(), atol=1e-4, rtol=1e-4)


def test_trainer_with_adapters_and_bfloat16(make_model, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer_of(model, Rows(make_batch, 4), tmp_path, bf16=True, gradient_checkpointing=True, optim="adamw_torch").train()
    unchanged = [name for name, old in before.items() if torch.equal(dict(model.named_parameters())[name], old)]
    assert unchanged == []


def test_a_trained_folder_loads(make_model, make_batch, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = make_model()
    trainer = trainer_of(model, Rows(make_batch, 4), tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    batch = make_batch()
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
