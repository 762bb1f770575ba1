"""A conversation with a trained model about images and videos, through the model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_model.processor import EagleProcessor
from eagle_model.prompt import IM_END

from .parallel import alone


class Chat:
    """Keeps what was said; `ask` answers greedily. images and videos belong to the first question."""

    def __init__(
        self,
        model: nn.Module,
        processor: EagleProcessor,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_new_tokens: int = 256,
        max_tokens: int | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.images, self.videos = list(images), list(videos)
        self.max_new_tokens, self.max_tokens = max_new_tokens, max_tokens
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system is not None else []

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
        target = world.device
        if (folder / "config.yaml").is_file():
            from .folder import open_run
            from .model import load_run_tokenizer
            from .run import load_trained

            config = open_run(folder)
            tokenizer = load_run_tokenizer(config)
            model, _ = load_trained(config, tokenizer, world)
            sampling = config.sampling
            settings = {
                "fps": sampling.fps,
                "min_frames": sampling.min_frames,
                "max_frames": sampling.max_frames,
                "placement": sampling.placement,
            }
            processor = EagleProcessor.for_config(tokenizer, model.config, **settings)  # type: ignore[arg-type]
            budget = max(stage.max_tokens for stage in config.stages)
            return cls(model, processor, max_new_tokens=max_new_tokens, max_tokens=budget, system=config.prompt.system, **media)
        from eagle_model.eagle import EagleForConditionalGeneration

        from .folder import check_model_folder

        check_model_folder(folder)
        dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
        model = EagleForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(target).eval()
        return cls(model, EagleProcessor.from_pretrained(folder), max_new_tokens=max_new_tokens, **media)  # type: ignore[arg-type]

    def ask(self, question: str) -> str:
        """The answer, which the next question may refer to. Raises PromptError, MediaError, or BudgetError when it doesn't fit."""
        messages = [*self.messages, {"role": "user", "content": question}]
        made = self.processor.process(messages, self.images, self.videos, add_generation_prompt=True, max_tokens=self.max_tokens)
        device = next(self.model.parameters()).device
        tokenizer = self.processor.tokenizer  # type: ignore[attr-defined]
        end = int(tokenizer.convert_tokens_to_ids(IM_END))
        ids = torch.from_numpy(made.input_ids)[None].to(device)
        with torch.inference_mode():
            result = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(made.tiles).to(device) if len(made.tiles) else None,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        answer = tokenizer.decode(result[0, ids.shape[1] :], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer
