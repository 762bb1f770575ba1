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
from eagle_train.training.model import check_model_folder

_PLACEHOLDER = re.compile(r"<(image|video)(-\d+)?>")


class Chat:
    """A conversation. `answer` and `stream` keep the keys and values of what was said, so that a turn computes only what is new.

    images and videos belong to the first question; `attach` adds media to the next one. settings: of `EagleProcessor.process`, for all
    turns (max_tiles, fps, max_tokens, ...).
    """

    def __init__(
        self,
        model: nn.Module,
        processor: EagleProcessor,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_new_tokens: int = 256,
        **settings: Any,
    ) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.images: list[Any] = []
        self.videos: list[Any] = []
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, str]] = []
        self._new: list[str] = []
        self._kept = _Kept()
        self._stop = Event()
        self.attach(images, videos)

    def attach(self, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> None:
        """Media of the next question, which stand before it unless its text places them (`<image-1>`)."""
        for kind, media, given in (("image", self.images, images), ("video", self.videos, videos)):
            for medium in given:
                media.append(medium)
                self._new.append(f"<{kind}-{len(media)}>")

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

    def detach(self, images: Sequence[Any], videos: Sequence[Any]) -> None:
        """Take back what `attach` added, when the question was refused. images, videos: those of before."""
        self.images, self.videos, self._new = list(images), list(videos), []

    def stop(self) -> None:
        """End the answer that is being generated, from another thread; what was said so far is its text."""
        self._stop.set()

    def answer(self, question: str) -> str:
        """The greedy answer, which the next question may refer to. Raises PromptError, MediaError, or BudgetError when it doesn't fit."""
        return "".join(self.stream(question)).strip()

    def plan(self, question: str) -> RequestPlan:
        """What the media of the conversation get when `question` is next; errors as `answer`."""
        placed = "" if _PLACEHOLDER.search(question) else "".join(self._new)
        messages = [*self.messages, {"role": "user", "content": placed + question}]
        return self.processor.plan_request(messages, self.images, self.videos, add_generation_prompt=True, **self.settings)

    def stream(
        self, question: str, *, temperature: float = 0.0, max_new_tokens: int | None = None, request: RequestPlan | None = None
    ) -> Iterator[str]:
        """Pieces of the answer as they are generated. temperature 0: greedy. request: what `plan` gave for the same question.

        Closing the iterator stops the generation; what was said until then is part of the conversation. Errors as `answer`, at the first
        piece.
        """
        request = request or self.plan(question)
        tiles = read_tiles(request.messages, request.images, request.videos, request.plan, request.spec)
        ids = request.encode(self.processor.costs.encoder).input_ids
        pieces: list[str] = []
        try:
            for piece in self._generate(ids, tiles, temperature, max_new_tokens or self.max_new_tokens):
                pieces.append(piece)
                yield piece
        except GeneratorExit:
            self._said(request, pieces)
            raise
        self._said(request, pieces)

    def _said(self, request: RequestPlan, pieces: Sequence[str]) -> None:
        asked = [dict(message) for message in request.messages]
        if self.processor.system_prompt is not None and not self.messages and asked[0]["role"] == "system":
            asked = asked[1:]
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
        self._new = []

    def _generate(self, ids: np.ndarray, tiles: np.ndarray, temperature: float, max_new_tokens: int) -> Iterator[str]:
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
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

        def work() -> None:
            try:
                with torch.inference_mode():
                    made = self.model.generate(  # type: ignore[operator]
                        input_ids=torch.from_numpy(ids)[None].to(device),
                        attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
                        pixel_values=torch.from_numpy(tiles).to(device) if len(tiles) else None,
                        **{CACHE_FIELD: cache},
                        max_new_tokens=max_new_tokens,
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
