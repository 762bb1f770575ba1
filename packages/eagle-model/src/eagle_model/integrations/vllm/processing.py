"""vLLM's media processor for Eagle: grids, frames, prompt and tiles by the functions of training.

The parts of a request depend on each other, since text, images and videos share one token budget (ADS). So a request is planned as a
whole, and what vLLM caches is a medium together with its plan.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.inputs.engine import mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from eagle_model.integrations.vllm.media import EagleDataParser, Medium
from eagle_model.integrations.vllm.prompt import parse_ids
from eagle_model.integrations.vllm.settings import processor_of, prompt_budget
from eagle_model.processor import EagleProcessor, RequestPlan
from eagle_model.prompt import IMG_CONTEXT
from eagle_model.prompt.render import media_order
from eagle_model.visual import read_image, read_video
from eagle_tiling import tile_count

MODALITIES = ("image", "video")


class EagleProcessingInfo(BaseProcessingInfo):
    """Limits of the model: any number of images and videos, within the context."""

    @property
    def processor(self) -> EagleProcessor:
        return processor_of(self.ctx.model_config)

    def get_hf_processor(self, **kwargs: object) -> Any:
        return self.processor

    def get_data_parser(self) -> EagleDataParser:
        return EagleDataParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(MODALITIES)

    @cached_property
    def most_frames(self) -> int:
        """No prompt holds a video of more frames: each needs its tile, two tags and the shortest header."""
        processor = self.processor
        frame = processor.costs.frame_tokens(1, None, processor.spec.tokens_per_tile)
        return max(prompt_budget(self.ctx.model_config, answer_tokens=1) // frame, 1)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Visual tokens of the largest image and of the longest video."""
        spec = self.processor.spec
        tiles = spec.max_tiles + (1 if spec.thumbnail and spec.max_tiles > 1 else 0)
        return {"image": min(tiles * spec.tokens_per_tile, seq_len), "video": self.most_frames * spec.tokens_per_tile}


class EagleDummyInputs(BaseDummyInputsBuilder[EagleProcessingInfo]):
    """The largest media, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(f"<{kind}-{number + 1}>" for kind in MODALITIES for number in range(mm_counts.get(kind, 0)))

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> dict[str, Any]:
        spec = self.info.processor.spec
        data: dict[str, Any] = {}
        if count := mm_counts.get("image", 0):
            # A row of squares: its best grid is the largest.
            data["image"] = [Image.new("RGB", (spec.max_tiles * spec.tile_size, spec.tile_size))] * count
        if count := mm_counts.get("video", 0):
            frame = np.zeros((spec.tile_size, spec.tile_size, 3), np.uint8)
            data["video"] = [{"frames": [frame] * self.info.most_frames}] * count
        return data


class EagleMultiModalProcessor(BaseMultiModalProcessor[EagleProcessingInfo]):
    """Plans a request, reads the tiles of media that are not cached, and gives vLLM ids and places of the visual tokens."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Raises PromptError, BudgetError, MediaError or ValueError for a request that cannot be served; vLLM answers with status 400."""
        processor = self.info.processor
        media = {kind: list(inputs.mm_data_items.get(kind) or ()) for kind in MODALITIES}
        settings = dict(self.info.ctx.get_mm_config().merge_mm_processor_kwargs(inputs.hf_processor_mm_kwargs))
        budget = settings.pop("max_tokens", None) or prompt_budget(self.info.ctx.model_config)
        with timing_ctx.record("plan"):
            prompt = parse_ids(inputs.prompt, processor.costs.encoder)
            request = processor.plan_request(
                prompt.messages,
                [medium.ref for medium in media["image"]],
                [medium.ref for medium in media["video"]],
                add_generation_prompt=prompt.answer_next,
                continue_final_message=prompt.open_answer,
                max_tokens=budget,
                **settings,
            )
            ids = request.encode(processor.costs.encoder).input_ids
            places = visual_places(ids, request, processor)
        hashes = {kind: [_hash(medium, request, kind, place) for place, medium in enumerate(media[kind])] for kind in MODALITIES}
        hashes = {kind: found for kind, found in hashes.items() if found}
        with timing_ctx.record("read_media"):
            kwargs = self._tiles(request, hashes, inputs.cache)
        return mm_input(prompt_token_ids=ids.tolist(), mm_kwargs=kwargs, mm_hashes=hashes, mm_placeholders=places)

    def _tiles(self, request: RequestPlan, hashes: Mapping[str, list[str]], cache: Any) -> Any:
        """The tiles of every medium, None for those that vLLM's cache holds."""
        cached = {kind: cache.is_cached(found) if cache is not None else [False] * len(found) for kind, found in hashes.items()}
        data: dict[str, torch.Tensor] = {}
        updates: dict[str, list[list[Any]]] = {}
        for kind, known in cached.items():
            wanted = [place for place, is_known in enumerate(known) if not is_known]
            # Items carry no prompt updates: the ids are complete, since they depend on all media of the request.
            updates[kind] = [[] for _ in wanted]
            if wanted:
                data[f"{kind}_tiles"] = torch.from_numpy(read_media(request, kind, wanted))
                data[f"{kind}_counts"] = torch.tensor([medium_tiles(request, kind, place) for place in wanted])
        features = BatchFeature(data)
        missing = MultiModalKwargsItems.from_hf_inputs(features, self._get_mm_fields_config(features, {}))
        if cache is None:
            return missing
        try:
            return self._merge_mm_kwargs(cache, hashes, cached, missing, updates)[0]
        finally:
            cache.release_sender_touches()

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, MultiModalFieldConfig]:
        fields = {}
        for kind in MODALITIES:
            if (counts := hf_inputs.get(f"{kind}_counts")) is not None:
                fields[f"{kind}_tiles"] = MultiModalFieldConfig.flat_from_sizes(kind, counts)
                fields[f"{kind}_counts"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        """Nothing: `apply` gives complete prompts. vLLM's base class requires the method."""
        return ()


def visual_places(ids: np.ndarray, request: RequestPlan, processor: EagleProcessor) -> dict[str, list[PlaceholderRange]]:
    """Where the visual tokens of each medium stand in the ids [T]: from its first to its last, only `<IMG_CONTEXT>` as embeddings."""
    positions = np.flatnonzero(ids == processor.costs.encoder.token_id(IMG_CONTEXT))
    places: dict[str, dict[int, PlaceholderRange]] = {kind: {} for kind in MODALITIES}
    start = 0
    for medium in media_order(request.messages, len(request.images), len(request.videos)):
        count = medium_tiles(request, medium.kind, medium.number - 1) * request.spec.tokens_per_tile
        own = positions[start : start + count]
        start += count
        length = int(own[-1] - own[0]) + 1
        mask = None
        if length != count:
            mask = torch.zeros(length, dtype=torch.bool)
            mask[torch.from_numpy(own - own[0])] = True
        places[medium.kind][medium.number - 1] = PlaceholderRange(int(own[0]), length, mask)
    return {kind: [found[number] for number in sorted(found)] for kind, found in places.items() if found}


def medium_tiles(request: RequestPlan, kind: str, place: int) -> int:
    """Tiles of one medium of a request."""
    if kind == "video":
        return request.plan.videos[place].count
    return tile_count(request.plan.grids[place], thumbnail=request.spec.thumbnail)


def read_media(request: RequestPlan, kind: str, places: Sequence[int]) -> np.ndarray:
    """Tiles of some media of one kind, one medium after the other, uint8 [n, s, s, 3]; raises MediaError."""
    side = request.spec.tile_size
    counts = [medium_tiles(request, kind, place) for place in places]
    tiles = np.empty((sum(counts), side, side, 3), np.uint8)
    start = 0
    for place, count in zip(places, counts, strict=True):
        own = tiles[start : start + count]
        start += count
        if kind == "video":
            read_video(own, request.videos[place], request.plan.videos[place])
        else:
            read_image(own, request.images[place], request.plan.grids[place], request.plan.sizes[place], request.spec)
    return tiles


def _hash(medium: Medium, request: RequestPlan, kind: str, place: int) -> str:
    """Name of a medium with its plan in vLLM's caches: the same image with another grid has other features."""
    digest = hashlib.sha256(medium.digest)
    if kind == "image":
        digest.update(repr((request.plan.grids[place], request.spec)).encode())
    else:
        video = request.plan.videos[place]
        for values in (video.times, video.indices):
            digest.update(b"none" if values is None else values.tobytes())
        digest.update(repr(request.spec.tile_size).encode())
    return digest.hexdigest()
