"""The processor: messages with images and videos in, ids and tiles out, through the one prompt and the one choice of tiles and frames."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.utils.hub import cached_file

from eagle_model.configuration import EagleConfig
from eagle_model.eagle import HUB_OPTIONS
from eagle_model.media import MediaSettings, fit, open_video, read_image, size_of
from eagle_model.messages import Conversation, chatml, flatten, parse_chatml
from eagle_model.prompt import IGNORE_INDEX, PromptError, encode, media_order, render
from eagle_model.prompt_costs import PromptCosts
from eagle_model.tokenizer import CHAT_TEMPLATE, check_tokenizer, load_tokenizer
from eagle_tiling import tile_count, tile_image

FILE = "processor_config.json"
SETTINGS = frozenset(field.name for field in fields(MediaSettings))
#: What a tokenised `apply_chat_template` passes on.
_CALL_OPTIONS = frozenset({"max_tokens", "padding_side", "return_labels", "return_tensors"})
#: Arguments that transformers passes to processors, with the values that ask for what happens here anyway; so does None, False or nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "chat_template_kwargs": (),
    "continue_final_message": (),
    "documents": (),
    "padding": (True, "longest"),
    "processor_kwargs": (),
    "return_attention_mask": (True,),
    "return_dict": (True,),
    "tools": (),
    "truncation": (),
}
#: What transformers tells every `from_pretrained`, for code from elsewhere and for the model beside the processor.
_NOT_OURS = frozenset({"attn_implementation", "code_revision", "device_map", "dtype", "torch_dtype", "trust_remote_code", "use_fast"})


class Processed(NamedTuple):
    """One conversation: input_ids, labels int64 [T]; tiles uint8 [N, s, s, 3] in the order of the prompt."""

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray


class EagleProcessor(ProcessorMixin):
    """Tokenizer and media settings in one.

    tokenizer: must know Eagle's tokens (`eagle_model.tokenizer`). settings: fields of `MediaSettings` (tile_size, tokens_per_tile,
    min_tiles, max_tiles, thumbnail, fps, min_frames, max_frames, placement). Raises PromptError when the tokenizer lacks a token.
    """

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None, **settings: Any) -> None:
        self.settings = MediaSettings(**settings)
        super().__init__(check_tokenizer(tokenizer), chat_template=chat_template or CHAT_TEMPLATE)
        self._costs: PromptCosts | None = None

    @classmethod
    def for_config(cls, tokenizer: Any, config: EagleConfig, **settings: Any) -> "EagleProcessor":
        """The processor that goes with a model's configuration; `settings` replace single fields of `MediaSettings`."""
        return cls(tokenizer, **(_settings_of(config) | settings))

    @property
    def costs(self) -> PromptCosts:
        """Token costs of prompts with this tokenizer."""
        if self._costs is None:
            self._costs = PromptCosts(self.tokenizer)
        return self._costs

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def process(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        *,
        add_generation_prompt: bool = False,
        max_tokens: int | None = None,
    ) -> Processed:
        """One conversation. Messages have text content with placeholders; images and videos as in `eagle_model.media`.

        max_tokens: the budget of the whole prompt; frames and tiles are chosen to fit (ADS). None takes all that is wanted.
        Raises PromptError, BudgetError (it can't fit), MediaError (unreadable media) or ValueError.
        """
        settings = self.settings
        pictures = [read_image(image) for image in images]
        clips = [open_video(video, settings) for video in videos]
        text_tokens = 0
        if max_tokens is not None:
            timed = [clip.end is not None for clip in clips]
            text_tokens = self.costs.fixed_tokens(
                messages, len(images), len(videos), timed=timed, add_generation_prompt=add_generation_prompt
            ).text_tokens
        sizes = [size_of(picture) for picture in pictures]
        grids, frames = fit(text_tokens, sizes, clips, self.costs.frame_tokens if clips else _no_frames, settings, max_tokens)
        taken = [clip.take(count) for clip, count in zip(clips, frames, strict=True)]
        tiles = []
        for medium in media_order(messages, len(images), len(videos)):
            if medium.kind == "image":
                picture, grid = pictures[medium.number - 1], grids[medium.number - 1]
                cut = tile_image(picture, grid, tile_size=settings.tile_size, thumbnail=settings.thumbnail)
                tiles.append(cut.cpu().numpy() if isinstance(cut, torch.Tensor) else cut)
            else:
                tiles.append(taken[medium.number - 1][0])
        segments = render(
            messages,
            images=[tile_count(grid, thumbnail=settings.thumbnail) * settings.tokens_per_tile for grid in grids],
            videos=[span for _, span in taken],
            add_generation_prompt=add_generation_prompt,
        )
        encoded = encode(segments, self.costs.encoder)
        side = settings.tile_size
        return Processed(*encoded, np.concatenate(tiles) if tiles else np.zeros((0, side, side, 3), np.uint8))

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        *,
        messages: Any = None,
        add_generation_prompt: bool | None = None,
        max_tokens: int | None = None,
        padding_side: str = "left",
        return_labels: bool = False,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one conversation or a batch of them: input_ids, attention_mask [B, L], pixel_values uint8 [N, s, s, 3].

        text or messages: a question, a ChatML string, a list of messages (content as text or as blocks), or a list of any of these.
        images, videos: for one conversation a list (or a single one); for a batch a list of lists. Media inside content blocks need
        not be given again. add_generation_prompt: whether an answer is wanted (default: unless the last message is an assistant's).
        return_labels: add labels [B, L] (-100 where nothing is learned). return_tensors: "pt" or "np".

        Raises what `process` raises, and TypeError or ValueError for other arguments, but for those of transformers' processors that ask
        for what happens anyway (`padding=True`).
        """
        _refuse(kwargs, _HARMLESS, "the processor", _CALL_OPTIONS)
        given = messages if messages is not None else text
        if given is None or (not isinstance(given, str) and len(given) == 0):
            raise PromptError("the processor needs text or messages")
        single = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], Mapping))
        rows = [given] if single else list(given)
        image_rows, video_rows = (_per_row(media, len(rows), single, kind) for media, kind in ((images, "images"), (videos, "videos")))
        processed = []
        for row, row_images, row_videos in zip(rows, image_rows, video_rows, strict=True):
            talk = parse_chatml(row) if isinstance(row, str) else flatten(row)
            talk = _with_media(talk, row_images, row_videos)
            wants = talk.answer_next or not talk.messages or talk.messages[-1]["role"] != "assistant"
            generate = (wants and not return_labels) if add_generation_prompt is None else add_generation_prompt or talk.answer_next
            processed.append(self.process(talk.messages, talk.images, talk.videos, add_generation_prompt=generate, max_tokens=max_tokens))
        return self._batch(processed, padding_side, return_labels, return_tensors)

    def _batch(self, rows: list[Processed], padding_side: str, labels: bool, return_tensors: str | None) -> BatchFeature:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
        length = max(len(row.input_ids) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = np.full((len(rows), length), pad, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        targets = np.full((len(rows), length), IGNORE_INDEX, np.int64)
        for index, row in enumerate(rows):
            place = slice(length - len(row.input_ids), length) if padding_side == "left" else slice(0, len(row.input_ids))
            ids[index, place], mask[index, place], targets[index, place] = row.input_ids, 1, row.labels
        data = {"input_ids": ids, "attention_mask": mask} | ({"labels": targets} if labels else {})
        tiles = np.concatenate([row.tiles for row in rows])
        if len(tiles):
            data["pixel_values"] = tiles
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Messages as a ChatML string with `<image-N>` and `<video-N>` (for `processor(text=..., images=...)`), or, with tokenize, as
        model inputs, media taken from the content blocks; then `kwargs` may be `max_tokens`, `padding_side`, `return_labels` and
        `return_tensors`. The format is Eagle's: another `chat_template`, `tools` and `continue_final_message` are refused."""
        if chat_template is not None and chat_template != self.chat_template:
            raise ValueError("Eagle has one prompt format; messages can't be rendered with another chat template")
        if tokenize:
            options = {key: kwargs.pop(key) for key in _CALL_OPTIONS & set(kwargs)}
            _refuse(kwargs, _HARMLESS, "apply_chat_template", _CALL_OPTIONS)
            return self(messages=conversation, add_generation_prompt=add_generation_prompt, **options)
        _refuse(kwargs, _HARMLESS, "apply_chat_template without tokenize", ())
        single = len(conversation) == 0 or isinstance(conversation[0], Mapping)
        texts = [
            chatml(flatten(messages).messages, add_generation_prompt=add_generation_prompt)
            for messages in ([conversation] if single else conversation)
        ]
        return texts[0] if single else texts

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds."""
        return {"processor_class": EagleProcessor.__name__, **asdict(self.settings)}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the tokenizer and `processor_config.json`. Raises ValueError for push_to_hub, which isn't supported."""
        if push_to_hub:
            raise ValueError("push_to_hub isn't supported; save to a folder and upload it")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        (folder / FILE).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        return [str(folder / FILE)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "EagleProcessor":
        """From a folder or hub name: the tokenizer, and settings from `processor_config.json` if Eagle wrote it, else from the model's
        `config.json` (released checkpoints). `kwargs` may replace single settings; TypeError for others."""
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        own = {key: kwargs.pop(key) for key in SETTINGS & set(kwargs)}
        others = {key: value for key, value in kwargs.items() if key not in _NOT_OURS and not key.startswith("_from_")}
        _refuse(others, {}, "from_pretrained", SETTINGS)
        written: dict[str, Any] = {}
        file = cached_file(pretrained_model_name_or_path, FILE, _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            written = {key: value for key, value in json.loads(Path(file).read_text()).items() if key in SETTINGS}
        if "tile_size" not in written:
            written |= _settings_of(EagleConfig.from_pretrained(pretrained_model_name_or_path, **hub))
        return cls(load_tokenizer(pretrained_model_name_or_path, **hub), **(written | own))


def _settings_of(config: EagleConfig) -> dict[str, Any]:
    tiles = config.max_dynamic_tiles if config.dynamic_image_size else 1
    return {
        "tile_size": config.tile_size,
        "tokens_per_tile": config.tokens_per_tile,
        "min_tiles": min(config.min_dynamic_tiles, tiles),
        "max_tiles": tiles,
        "thumbnail": config.use_thumbnail,
    }


def _refuse(given: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]], where: str, known: Iterable[str]) -> None:
    """Raise TypeError for arguments that don't exist, ValueError for transformers' where they ask for what isn't supported."""
    for name, value in given.items():
        if name in harmless:
            if value and value not in harmless[name]:
                raise ValueError(f"{where}: {name}={value!r} isn't supported")
        elif name in SETTINGS:
            raise TypeError(f"{where} has no argument {name}: it is a setting of the processor, given when that is made or loaded")
        elif value is not None:
            near = get_close_matches(name, known, 1)
            raise TypeError(f"{where} has no argument {name}{f'; is {near[0]} meant?' if near else ''}")


def _no_frames(count: int, end_time: float | None, k: int) -> int:
    return k


def _per_row(media: Any, rows: int, single: bool, kind: str) -> list[Any]:
    if media is None:
        return [None] * rows
    if single:
        return [list(media) if isinstance(media, list | tuple) else [media]]
    if len(media) != rows or not all(row is None or isinstance(row, list | tuple) for row in media):
        raise ValueError(f"a batch of {rows} conversations needs {kind} as {rows} lists, one for each")
    return list(media)


def _with_media(talk: Conversation, images: Any, videos: Any) -> Conversation:
    for kind, own, given in (("images", talk.images, images), ("videos", talk.videos, videos)):
        if own and given:
            raise PromptError(f"{kind} stand in the content blocks and are given beside them; give them once")
    return talk._replace(images=talk.images or list(images or ()), videos=talk.videos or list(videos or ()))


class Eagle2_5_VLProcessor(EagleProcessor):
    """The name that released folders give their processor; `AutoProcessor` looks it up by that."""


class Eagle2_5_VLConfig(EagleConfig):
    """The name of the released configuration class; only there because processors are registered by configuration class."""


AutoProcessor.register(EagleConfig, EagleProcessor, exist_ok=True)
AutoProcessor.register(Eagle2_5_VLConfig, Eagle2_5_VLProcessor, exist_ok=True)
