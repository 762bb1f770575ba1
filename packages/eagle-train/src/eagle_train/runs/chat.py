"""A conversation with a trained model about images and videos, through the model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from eagle_model.processor import EagleProcessor
from eagle_train.distributed.world import alone
from eagle_train.evaluation.generate import generate


class Chat:
    """A conversation with a model.

    images, videos: media of the first question. system: system message; None: that of the processor. temperature: 0 decodes greedily,
    larger values sample. settings: arguments of `EagleProcessor.process` for every question (`fps`, `max_tiles`, ...).
    """

    def __init__(
        self,
        model: nn.Module,
        processor: EagleProcessor,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        system: str | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.images, self.videos = list(images), list(videos)
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    @classmethod
    def open(
        cls, folder: str | Path, *, images: Sequence[Path] = (), videos: Sequence[Path] = (), device: str | None = None, **options: Any
    ) -> Chat:
        """From a run folder (its newest checkpoint), or a folder of an exported or released model. options: as in the class.

        Raises ConfigError for another folder, before anything is loaded, and FileNotFoundError for a medium that does not exist.
        """
        folder = Path(folder)
        media = {"images": existing(images), "videos": existing(videos)}
        world = alone(device)
        if (folder / "config.yaml").is_file():
            from eagle_train.training.model import load_run_tokenizer

            from .export import load_trained, run_processor
            from .folder import open_run

            config = open_run(folder)
            tokenizer = load_run_tokenizer(config)
            model, _ = load_trained(config, tokenizer, world)
            return cls(model, run_processor(config, tokenizer, model.config), **media, **options)
        from .exported import load_exported

        return cls(*load_exported(folder, world.device), **media, **options)

    def answer(self, question: str, images: Sequence[Path] = (), videos: Sequence[Path] = ()) -> str:
        """The answer, which the next question may refer to. images, videos: further media, which belong to this question.

        Media without a placeholder (`<image-N>`, `<video-N>`, counted over the conversation) come before the question. Raises PromptError,
        MediaError, FileNotFoundError, or BudgetError when it doesn't fit; the conversation is then as it was before.
        """
        all_images, all_videos = [*self.images, *existing(images)], [*self.videos, *existing(videos)]
        new = [("image", len(self.images), len(images)), ("video", len(self.videos), len(videos))]
        placeholders = [f"<{kind}-{before + number}>" for kind, before, count in new for number in range(1, count + 1)]
        content = "".join(placeholder for placeholder in placeholders if placeholder not in question) + question
        messages = [*self.messages, {"role": "user", "content": content}]
        made = self.processor.process(messages, all_images, all_videos, add_generation_prompt=True, **self.settings)
        [text] = generate(
            self.model,
            self.processor.tokenizer,  # type: ignore[attr-defined]
            [made.input_ids],
            made.tiles,
            max_new_tokens=self.max_new_tokens,
            device=next(self.model.parameters()).device,
            temperature=self.temperature,
        )
        self.images, self.videos = all_images, all_videos
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text


def existing(paths: Sequence[Path]) -> list[str]:
    """The paths as text; raises FileNotFoundError for one that is not a file."""
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
    return [str(path) for path in paths]
