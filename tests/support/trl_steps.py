"""What the tests of TRL share: arguments of one short step on a CPU, answers, and which parameters a step changed."""

from typing import Any

import torch

ARGUMENTS = {
    "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "use_cpu": True,
    "bf16": False, "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0,
}  # fmt: skip


def answers(*texts: str) -> list[list[dict[str, str]]]:
    """Turns of the assistant, one conversation's each."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def steps(trainer: Any, model: torch.nn.Module) -> tuple[list[dict[str, Any]], list[str]]:
    """Train; gives the log, and the names of trainable parameters that did not change."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(model.named_parameters())
    return trainer.state.log_history, [name for name, old in before.items() if torch.equal(after[name], old)]
