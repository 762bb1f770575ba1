"""Loss curves of the optimizers that take less memory next to AdamW in float32: a small model, several seeds, the same batches.

    OMP_NUM_THREADS=1 python low_memory.py --out results/low-memory.json

The model is Eagle's decoder (2 layers, width 64) without images; the data are sequences of a fixed random automaton of 64 states
(each has 4 likely successors), whose entropy is the lowest loss that can be reached. Computation is in bfloat16 (autocast) for all, so
that only what is kept differs: weights, states, rounding. `nearest` keeps bfloat16 weights and rounds to the nearest, for comparison.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from eagle_model import EagleForConditionalGeneration, preset
from eagle_train.config import StageConfig
from eagle_train.training.optim import make_optimizer, set_learning_rates

STATES, LENGTH, ROWS = 64, 48, 4
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTENDERS = ("adamw", "bfloat16", "nearest", "adamw_host", "adamw8bit", "adamw8bit-bfloat16")


def automaton(seed: int) -> Tensor:
    """Probabilities [STATES, STATES] of the next token."""
    generator = torch.Generator().manual_seed(1000 + seed)
    logits = torch.randn(STATES, STATES, generator=generator)
    top = logits.topk(4, dim=1)
    return torch.full_like(logits, 0.002).scatter(1, top.indices, 1.0).div_(4 + 0.002 * (STATES - 4))


def batches(chain: Tensor, seed: int, steps: int):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = [torch.randint(0, STATES, (ROWS,), generator=generator)]
        for _ in range(LENGTH - 1):
            tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator).squeeze(1))
        yield torch.stack(tokens, 1)


def optimizer_of(name: str, model: nn.Module, stage: StageConfig):
    if name != "nearest":
        return make_optimizer(model, stage)
    return torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=stage.betas, eps=stage.eps, weight_decay=stage.weight_decay)


def small_model(seed: int) -> EagleForConditionalGeneration:
    """The decoder, of which only the language model is trained."""
    torch.manual_seed(seed)
    model = EagleForConditionalGeneration(preset("tiny", text_config=SIZES, image_token_index=100)).train()
    model.requires_grad_(False)
    model.language_model.requires_grad_(True)
    return model


def stage_of(optimizer: str, options: argparse.Namespace) -> StageConfig:
    return StageConfig(name="one", max_tokens=LENGTH, optimizer=optimizer, lr=options.lr, betas=(0.9, 0.99))  # pyright: ignore[reportArgumentType]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, stage: StageConfig, seed: int, steps: int) -> list[float]:
    """Losses of all steps."""
    losses = []
    for step, tokens in enumerate(batches(automaton(seed), seed, steps)):
        set_learning_rates(optimizer, step, steps, stage)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(name: str, seed: int, options: argparse.Namespace) -> list[float]:
    model = small_model(seed)
    if name in ("bfloat16", "nearest", "adamw8bit-bfloat16"):
        model.to(torch.bfloat16)
    stage = stage_of({"bfloat16": "adamw", "nearest": "adamw", "adamw8bit-bfloat16": "adamw8bit"}.get(name, name), options)
    return train(model, optimizer_of(name, model, stage), stage, seed, options.steps)


def installed(name: str) -> bool:
    import importlib.util

    return "8bit" not in name or importlib.util.find_spec("torchao") is not None


def compare(doc: str | None, contenders: Sequence[str], run: Callable[[str, int, argparse.Namespace], list[float]]) -> None:
    """The command: losses of `run(contender, seed, options)` for every contender and seed, printed and written."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--only", nargs="+", choices=contenders, default=list(contenders))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chain = automaton(0)
    result = (
        json.loads(options.out.read_text())
        if options.out and options.out.exists()
        else {
            "machine": {"torch": torch.__version__, "cpus": os.cpu_count(), "date": time.strftime("%F")},
            "options": {"steps": options.steps, "lr": options.lr, "tokens": ROWS * LENGTH},
            "entropy": round(-(chain * chain.log()).sum(1).mean().item(), 4),
            "curves": {},
            "last": {},
        }
    )
    given = {"steps": options.steps, "lr": options.lr, "tokens": ROWS * LENGTH}
    if result["options"] != given:
        parser.error(f"{options.out} is of runs with {result['options']}, not {given}; give another --out")
    for name in options.only:
        begin = time.monotonic()
        curves = [run(name, seed, options) for seed in range(options.seeds)]
        # Means of 10 steps; the last 50 steps of every seed as one number.
        result["curves"][name] = [[round(statistics.mean(one[k : k + 10]), 4) for k in range(0, len(one), 10)] for one in curves]
        last = [statistics.mean(one[-50:]) for one in curves]
        result["last"][name] = [round(value, 4) for value in last]
        print(f"{name}: {', '.join(f'{value:.4f}' for value in last)} ({time.monotonic() - begin:.0f} s)", flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    compare(__doc__, tuple(filter(installed, CONTENDERS)), run)
