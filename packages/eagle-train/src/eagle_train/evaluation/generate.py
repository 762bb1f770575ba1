"""Answers to a batch of prompts: the one way in which evaluation and chat generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from eagle_model.prompt import IM_END
from eagle_train.distributed.sharding import is_sharded


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    tiles: np.ndarray,
    *,
    max_new_tokens: int,
    device: torch.device,
    temperature: float = 0.0,
    together: bool = False,
) -> list[str]:
    """The model's answer to each prompt, up to `<|im_end|>`.

    prompts: int64 [T] each, ending with the assistant's header. tiles: uint8 [N, s, s, 3] of all of them, in order.
    temperature: 0 takes the most probable token, larger values sample. together: the model is sharded over several ranks, which all call
    this at once, also without a prompt.
    """
    if not prompts and not together:
        return []
    end = int(tokenizer.convert_tokens_to_ids(IM_END))
    rows = list(prompts) or [np.array([end], np.int64)]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), end)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for place, prompt in enumerate(rows):
        ids[place, length - len(prompt) :] = torch.from_numpy(prompt)
        mask[place, length - len(prompt) :] = 1
    # FSDP2 keeps the buffers that it gathers parameters into: made in inference mode, neither a loss nor training could use them.
    with torch.no_grad() if is_sharded(model) else torch.inference_mode():
        made = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=torch.from_numpy(tiles).to(device) if len(tiles) or together else None,
            max_new_tokens=max_new_tokens,
            **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
            pad_token_id=end,
            eos_token_id=end,
            synced_gpus=together,
        )
    texts = tokenizer.batch_decode(made[: len(prompts), length:].cpu(), skip_special_tokens=True) if prompts else []
    return [text.strip() for text in texts]
