"""A conversation with a trained model about images and videos, through the model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_model.processor import EagleProcessor
from eagle_train.distributed.world import alone
from eagle_train.evaluation.generate import generate
from eagle_train.training.model import check_model_folder


class Chat:
    """A conversation; `answer` decodes greedily. images and videos belong to the first question."""

    def __init__(
        self,
        model: nn.Module,
        processor: EagleProcessor,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_new_tokens: int = 256,
    ) -> None:
        self.model, self.processor = model, processor
        self.images, self.videos = list(images), list(videos)
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, str]] = []

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        images: Sequence[Path] = (),
        videos: Sequence[Path] = (),
        device: str | None = None,
        max_new_tokens: int = 256,
    ) -> Chat:
        """From a run folder (its newest checkpoint), or a folder of an exported or released model.

        Raises ConfigError for another folder, before anything is loaded, and FileNotFoundError for a medium that does not exist.
        """
        folder = Path(folder)
        for path in (*images, *videos):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: there is no such file")
        media = {"images": [str(path) for path in images], "videos": [str(path) for path in videos]}
        world = alone(device)
        if (folder / "config.yaml").is_file():
            from eagle_train.training.model import load_run_tokenizer

            from .export import load_trained, run_processor
            from .folder import open_run

            config = open_run(folder)
            tokenizer = load_run_tokenizer(config)
            model, _ = load_trained(config, tokenizer, world)
            return cls(model, run_processor(config, tokenizer, model.config), max_new_tokens=max_new_tokens, **media)
        from eagle_model.eagle import EagleForConditionalGeneration

        check_model_folder(folder)
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        model = EagleForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(world.device).eval()
        return cls(model, EagleProcessor.from_pretrained(folder), max_new_tokens=max_new_tokens, **media)  # type: ignore[arg-type]

    def answer(self, question: str) -> str:
        """The answer, which the next question may refer to. Raises PromptError, MediaError, or BudgetError when it doesn't fit."""
        messages = [*self.messages, {"role": "user", "content": question}]
        made = self.processor.process(messages, self.images, self.videos, add_generation_prompt=True)
        device = next(self.model.parameters()).device
        tokenizer = self.processor.tokenizer  # type: ignore[attr-defined]
        [text] = generate(self.model, tokenizer, [made.input_ids], made.tiles, max_new_tokens=self.max_new_tokens, device=device)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text
