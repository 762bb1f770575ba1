"""A conversation with a trained model about images and videos, through the model's own processor."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, StoppingCriteria, TextIteratorStreamer

from eagle_model.padded import CACHE_FIELD
from eagle_model.processor import EagleProcessor, RequestPlan
from eagle_model.prompt import IM_END, IMG_CONTEXT
from eagle_model.visual import read_tiles
from eagle_train.distributed.world import alone
from eagle_train.errors import WRONG_USE, TrainError


class Chat:
    """A conversation with a model. Keys and values of earlier turns are kept, so that a turn computes only what is new.

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
        self._kept = _Kept()
        self._stop = Event()

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

    def answer(self, question: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> str:
        """The answer, which the next question may refer to. images, videos: further media, which belong to this question.

        Media without a placeholder (`<image-N>`, `<video-N>`, counted over the conversation) come before the question. Raises PromptError,
        MediaError, FileNotFoundError, or BudgetError when it doesn't fit; the conversation is then as it was before.
        """
        return "".join(self.stream(question, images, videos)).strip()

    def plan(self, question: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> RequestPlan:
        """What the media of the conversation get when `question` is next; arguments and errors as in `answer`."""
        all_images, all_videos = [*self.images, *existing(images)], [*self.videos, *existing(videos)]
        return self.processor.plan_request(
            self._asked(question, images, videos), all_images, all_videos, add_generation_prompt=True, **self.settings
        )

    def stream(
        self, question: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), *, request: RequestPlan | None = None
    ) -> Iterator[str]:
        """Pieces of the answer as they are generated; arguments and errors as in `answer`. request: what `plan` gave for the same question.

        `stop`, or closing the iterator, ends the generation; what was said until then is the answer.
        """
        request = request or self.plan(question, images, videos)
        tiles = read_tiles(request.messages, request.images, request.videos, request.plan, request.spec)
        ids = request.encode(self.processor.costs.encoder).input_ids
        asked = self._asked(question, images, videos)
        pieces: list[str] = []
        finished = False
        try:
            for piece in self._generate(ids, tiles):
                pieces.append(piece)
                yield piece
            finished = True
        except GeneratorExit:
            finished = True
            raise
        finally:
            if finished:
                self.images += existing(images)
                self.videos += existing(videos)
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]

    def stop(self) -> None:
        """End the answer that is being generated, from another thread."""
        self._stop.set()

    def _asked(self, question: str, images: Sequence[Any], videos: Sequence[Any]) -> list[dict[str, str]]:
        """The messages with the question, and placeholders for media that it does not place."""
        new = [("image", len(self.images), len(images)), ("video", len(self.videos), len(videos))]
        placeholders = [f"<{kind}-{before + number}>" for kind, before, count in new for number in range(1, count + 1)]
        content = "".join(placeholder for placeholder in placeholders if placeholder not in question) + question
        return [*self.messages, {"role": "user", "content": content}]

    def _generate(self, ids: np.ndarray, tiles: np.ndarray) -> Iterator[str]:
        device = next(self.model.parameters()).device
        tokenizer = self.processor.tokenizer  # type: ignore[attr-defined]
        end = int(tokenizer.convert_tokens_to_ids(IM_END))
        known, tiles = self._kept.reuse(ids, tiles, int(tokenizer.convert_tokens_to_ids(IMG_CONTEXT)), self.processor.spec.tokens_per_tile)
        cache = self._kept.cache
        # transformers puts the whole prompt first, then every new token; with an empty queue its iterator would wait forever, so `end`
        # is called whatever happens.
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = Event(), list[BaseException]()
        self._stop = stop
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}

        def work() -> None:
            try:
                with torch.inference_mode():
                    made = self.model.generate(  # type: ignore[operator]
                        input_ids=torch.from_numpy(ids)[None].to(device),
                        attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
                        pixel_values=torch.from_numpy(tiles).to(device) if len(tiles) else None,
                        **{CACHE_FIELD: cache},
                        max_new_tokens=self.max_new_tokens,
                        pad_token_id=end,
                        eos_token_id=end,
                        streamer=streamer,
                        stopping_criteria=[_Stopped(stop)],
                        **sampling,
                    )
                self._kept.ids = made[0].cpu().numpy()
            except BaseException as error:  # raised again in the caller's thread
                failed.append(error)
                self._kept.clear()
                streamer.end()

        assert cache.get_seq_length() == known
        worker = Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            stop.set()
            worker.join()
        if failed:
            raise failed[0]


class _Stopped(StoppingCriteria):
    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _Kept:
    """Keys and values of the last turn. ids: int64 [T], its prompt and answer; tiles: a digest of each of its tiles."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.cache, self.ids, self.tiles = DynamicCache(), np.zeros(0, np.int64), list[bytes]()

    def reuse(self, ids: np.ndarray, tiles: np.ndarray, image: int, k: int) -> tuple[int, np.ndarray]:
        """Cut the cache back to what the prompt `ids` begins with. Gives how many tokens that are, and the tiles of the others.

        A tile counts as the same when its pixels are; at least the last token of the prompt is always computed.
        """
        digests = [hashlib.sha256(tile.tobytes()).digest() for tile in tiles]
        most = min(self.cache.get_seq_length(), len(self.ids), len(ids) - 1)
        differ = np.flatnonzero(self.ids[:most] != ids[:most])
        known = int(differ[0]) if len(differ) else max(most, 0)
        places = np.flatnonzero(ids == image)
        same = next((place for place, (old, new) in enumerate(zip(self.tiles, digests)) if old != new), min(len(self.tiles), len(digests)))
        whole = min(same, int(np.searchsorted(places, known)) // k)
        if whole < len(digests):
            known = min(known, int(places[whole * k]))
        if known == 0:
            self.clear()
        elif (surplus := self.cache.get_seq_length() - known) > 0:
            self.cache.crop(-surplus)  # transformers 5.24 takes only the number of tokens to remove
        self.tiles = digests
        return known, tiles[whole:]


class MissingMediumError(TrainError, FileNotFoundError):
    """A path that the caller gave is not a file."""

    exit_code = WRONG_USE


def existing(media: Sequence[Any]) -> list[Any]:
    """The media, paths as text; raises MissingMediumError for a path that is not a file."""
    for medium in media:
        if isinstance(medium, str | Path) and not Path(medium).is_file():
            # A Path of an address has lost one of its slashes.
            remote = re.match(r"[a-z][a-z0-9+.-]*:/", str(medium))
            what = "addresses are not read; download the file and name it" if remote else "there is no such file"
            raise MissingMediumError(f"{medium}: {what}")
    return [str(medium) if isinstance(medium, Path) else medium for medium in media]
