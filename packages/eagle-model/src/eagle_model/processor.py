"""The processor: messages with images, videos and documents in, ids and tiles out, by the prompt and visual pipeline of training."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils.hub import cached_file

from eagle_model.arguments import (
    CALL_OPTIONS,
    CALL_SETTINGS,
    HARMLESS,
    NOT_OURS,
    OF_IMAGES,
    OF_VIDEOS,
    SETTINGS,
    budget,
    changed,
    flat,
    own_settings,
    per_row,
    refuse,
    wants_padding,
)
from eagle_model.configuration import EagleConfig
from eagle_model.hub import HUB_OPTIONS
from eagle_model.media_parts import ImagePart, VideoPart
from eagle_model.prompt import IGNORE_INDEX, IMG_CONTEXT, CachedEncoder, PromptError, with_system
from eagle_model.prompt.chat import chatml, flatten, parse_chatml, with_media
from eagle_model.prompt.costs import PromptCosts
from eagle_model.request import Processed, RequestPlan, batched
from eagle_model.tokenizer import CHAT_TEMPLATE, check_tokenizer, load_tokenizer
from eagle_model.visual import (
    VisualSpec,
    as_video,
    load_image,
    measure_video,
    plan_sample,
    read_tiles,
    size_of,
)
from eagle_sampling import MediaError

FILE = "processor_config.json"


class EagleProcessor(ProcessorMixin):
    """Tokenizer and visual pipeline in one.

    tokenizer: must know Eagle's tokens (`eagle_model.tokenizer`). system_prompt: system message of conversations that have none; None:
    that of the released processor. max_tokens: budget of a prompt when a call gives none; None: no limit.
    settings: fields of `VisualSpec` (tile_size, tokens_per_tile, min_tiles, max_tiles, thumbnail, strategy, fps, min_frames, max_frames,
    placement). `spec` holds them; it is frozen: a call may replace some of them for itself.
    Raises PromptError when the tokenizer lacks a token, ValueError for settings that contradict each other.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        *,
        system_prompt: str | None = None,
        max_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        unknown = sorted(set(settings) - SETTINGS)
        if unknown:
            near = get_close_matches(unknown[0], SETTINGS, 1)
            raise TypeError(f"the processor has no setting {unknown[0]}{f'; is {near[0]} meant?' if near else ''}")
        self.spec = VisualSpec(**settings)
        self.system_prompt, self.max_tokens = system_prompt, max_tokens
        super().__init__(check_tokenizer(tokenizer), chat_template=chat_template or CHAT_TEMPLATE)
        self._costs: PromptCosts | None = None

    @classmethod
    def for_config(cls, tokenizer: Any, config: EagleConfig, **settings: Any) -> "EagleProcessor":
        """The processor that goes with a model's configuration; `settings` replace single settings."""
        return cls(tokenizer, **(visual_settings(config) | settings))

    @property
    def costs(self) -> PromptCosts:
        """Token costs of prompts with this tokenizer."""
        if self._costs is None:
            self._costs = PromptCosts(CachedEncoder(self.tokenizer))  # type: ignore[attr-defined]
        return self._costs

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def plan_request(
        self,
        messages: Sequence[Mapping[str, Any]] | str,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
        **settings: Any,
    ) -> "RequestPlan":
        """What the media of one conversation get, before any of their pixels is read (images are opened). Arguments and errors as in
        `process`."""
        spec = changed(self.spec, settings)
        prompt = messages if isinstance(messages, str) else with_system(messages, self.system_prompt)
        most = self.max_tokens if max_tokens is None else max_tokens
        opened = [own_settings(image, OF_IMAGES, "image") for image in images]
        pictures = [_open(image, number) for number, (image, _) in enumerate(opened, 1)]
        given = [own_settings(video, OF_VIDEOS, "video") for video in videos]
        refs = [as_video(video) for video, _ in given]
        fixed = self.costs.fixed_tokens(
            prompt, len(pictures), len(refs), timed=[ref.timed for ref in refs], add_generation_prompt=add_generation_prompt
        )
        plan = plan_sample(
            fixed.text_tokens,
            [size_of(picture) for picture in pictures],
            [measure_video(ref) for ref in refs],
            spec,
            self.costs.frame_costs,
            max_tokens=most,
            image_limits=[own.get("max_tiles", spec.max_tiles) for _, own in opened],
            video_specs=[changed(spec, own) for _, own in given],
        )
        segments = plan.render(prompt, spec, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        placed = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return RequestPlan(placed, pictures, refs, plan, spec, segments, most)

    def process(
        self,
        messages: Sequence[Mapping[str, Any]] | str,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
        **settings: Any,
    ) -> Processed:
        """One conversation. Messages have text content with placeholders; images as `eagle_model.visual.load_image` takes them, videos and
        documents as `as_video` takes them. A text is a prompt that is ChatML already, or a part of one, and is taken as it stands
        (`eagle_model.prompt.render_text`).

        continue_final_message: leave the last message, an assistant's, open, so that its text is continued.
        max_tokens: the budget of the whole prompt; frames and tiles are chosen to fit (ADS). Default: the processor's; without one every
        medium gets all that it wants. settings: `CALL_SETTINGS`, for this call (num_frames: just so many frames of every video); an image
        may be a mapping with `max_tiles`, a video one with `fps`, `num_frames`, `min_frames`, `max_frames` or `placement` of its own.
        Raises PromptError, BudgetError (it can't fit), MediaError (unreadable media) or ValueError.
        """
        request = self.plan_request(
            messages,
            images,
            videos,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            max_tokens=max_tokens,
            **settings,
        )
        tiles = read_tiles(request.messages, request.images, request.videos, request.plan, request.spec)
        return Processed(*request.encode(self.costs.encoder), tiles, request.visual_kinds())

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        *,
        messages: Any = None,
        add_generation_prompt: bool | None = None,
        add_special_tokens: bool | None = None,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        padding_side: str = "left",
        return_assistant_tokens_mask: bool = False,
        return_labels: bool = False,
        return_mm_token_type_ids: bool = False,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one conversation or a batch of them: input_ids, attention_mask [B, L], pixel_values uint8 [N, s, s, 3].

        text or messages: a question, a ChatML string, a list of messages (content as text or as blocks), or a list of any of these.
        images, videos: for one conversation a list (or a single one); for a batch a list of lists, or of one medium for each text. Media
        inside content blocks are not given again. add_generation_prompt: whether an answer is wanted (default: if the last message is not
        an assistant's). continue_final_message: leave the last message, an assistant's, open, so that generation continues it.
        add_special_tokens: False takes a string as it stands, as ChatML or a part of it (the answer alone, for example).
        max_tokens (transformers' name is max_length) and `CALL_SETTINGS` (max_tiles, fps, num_frames, ...): as in `process`, also inside
        `images_kwargs` and `videos_kwargs`; nothing is cut to max_length, frames and tiles are reduced to it.
        return_labels: add labels [B, L] (-100 where nothing is learned). return_assistant_tokens_mask: add assistant_masks [B, L], 1 where
        labels are. return_mm_token_type_ids: add mm_token_type_ids [B, L], 1 for visual tokens of images, 2 for those of videos and
        documents, 0 elsewhere. return_tensors: "pt" or "np"; None gives lists, padded only with padding=True.

        Raises what `process` raises, and TypeError or ValueError for other arguments, except those of transformers' processors that ask
        for what happens anyway.
        """
        kwargs = flat(kwargs)
        settings = {name: kwargs.pop(name) for name in CALL_SETTINGS if name in kwargs}
        refuse(kwargs, HARMLESS, "the processor", CALL_OPTIONS)
        if isinstance(images, str) and messages is None and text is not None and not isinstance(text, str | list | tuple):
            raise TypeError("images come first: call the processor as processor(images, text), or with text=... and images=...")
        given = messages if messages is not None else text
        if given is not None and not hasattr(given, "__len__"):
            raise TypeError(f"the processor takes text (a string or a list) or messages (a list), not {type(given).__name__}")
        if given is None or (not isinstance(given, str) and len(given) == 0):
            raise PromptError("the processor needs text or messages")
        single = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], Mapping))
        rows = [given] if single else list(given)
        image_rows, video_rows = (per_row(media, len(rows), single, kind) for media, kind in ((images, "images"), (videos, "videos")))
        processed = []
        for row, row_images, row_videos in zip(rows, image_rows, video_rows, strict=True):
            options = settings | {"max_tokens": budget(max_tokens, max_length), "continue_final_message": continue_final_message}
            if isinstance(row, str) and add_special_tokens is False:
                options["add_generation_prompt"] = bool(add_generation_prompt)
                processed.append(self.process(row, row_images or (), row_videos or (), **options))
                continue
            talk = parse_chatml(row) if isinstance(row, str) else flatten(row)
            talk = with_media(talk, row_images, row_videos)
            wants = talk.answer_next or not talk.messages or talk.messages[-1]["role"] != "assistant"
            generate = (wants and not return_labels) if add_generation_prompt is None else add_generation_prompt or talk.answer_next
            processed.append(self.process(talk.messages, talk.images, talk.videos, add_generation_prompt=generate, **options))
        columns: dict[str, list[np.ndarray]] = {"input_ids": [row.input_ids for row in processed]}
        if return_labels:
            columns["labels"] = [row.labels for row in processed]
        if return_assistant_tokens_mask:
            columns["assistant_masks"] = [(row.labels != IGNORE_INDEX).astype(np.int64) for row in processed]
        if return_mm_token_type_ids:
            columns["mm_token_type_ids"] = [self._visual_types(row) for row in processed]
        pad = self.tokenizer.pad_token_id  # type: ignore[attr-defined]
        data = batched(columns, padding_side, wants_padding(padding, return_tensors), 0 if pad is None else pad)
        tiles = np.concatenate([row.tiles for row in processed])
        if len(tiles):
            data["pixel_values"] = tiles
        return BatchFeature(data, tensor_type=return_tensors)

    def _visual_types(self, row: Processed) -> np.ndarray:
        types = np.zeros(len(row.input_ids), np.int64)
        types[row.input_ids == self.costs.encoder.token_id(IMG_CONTEXT)] = row.visual_kinds
        return types

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Messages as a ChatML string with `<image-N>` and `<video-N>`, or, with tokenize, as model inputs, media taken from the blocks.

        A string goes, with the media, to `processor(text=..., images=..., add_special_tokens=False)`. With tokenize, `kwargs` are options
        of `__call__`, and as in transformers the inputs are unpadded lists unless return_tensors (or padding) is given; return_dict=False
        gives input_ids alone. The format is Eagle's: another `chat_template` and `tools` are refused.
        """
        if chat_template is not None and chat_template != self.chat_template:
            raise ValueError("Eagle has one prompt format; messages can't be rendered with another chat template")
        kwargs = flat(kwargs)
        turns = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if tokenize:
            options = {key: kwargs.pop(key) for key in CALL_OPTIONS & set(kwargs)}
            options.pop("add_special_tokens", None)  # it is about strings
            refuse(kwargs, HARMLESS, "apply_chat_template", CALL_OPTIONS)
            inputs = self(messages=conversation, return_tensors=return_tensors, **turns, **options)
            return inputs if return_dict else inputs["input_ids"]
        kwargs = {name: value for name, value in kwargs.items() if name != "add_special_tokens"}
        refuse(kwargs, HARMLESS, "apply_chat_template without tokenize", ())
        single = len(conversation) == 0 or isinstance(conversation[0], Mapping)
        texts = [
            chatml(with_system(flatten(messages).messages, self.system_prompt), **turns)
            for messages in ([conversation] if single else conversation)
        ]
        return texts[0] if single else texts

    # ---- parts, as transformers' generic programs look for them --------------------------------------------------------------------

    @property
    def image_processor(self) -> ImagePart:
        """Images alone to tiles (`eagle_model.media_parts`)."""
        return ImagePart(self.spec)

    @property
    def video_processor(self) -> VideoPart:
        """Videos and documents alone to tiles (`eagle_model.media_parts`)."""
        return VideoPart(self.spec)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, video_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Visual tokens of media by their sizes, without a budget, as transformers' generic programs (vLLM) ask for them.

        image_sizes: (height, width) of each image. video_sizes: (frames, height, width) of videos whose frames are chosen already.
        kwargs: `CALL_SETTINGS`. Gives `num_image_tokens`, `num_image_patches` (tiles) and `num_video_tokens`, lists.
        """
        spec = changed(self.spec, {name: value for name, value in flat(kwargs).items() if name in CALL_SETTINGS})
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            tiles = [ImagePart(spec).get_number_of_image_patches(height, width) for height, width in image_sizes]
            counts |= {"num_image_patches": tiles, "num_image_tokens": [count * spec.tokens_per_tile for count in tiles]}
        if video_sizes is not None:
            counts["num_video_tokens"] = [int(frames) * spec.tokens_per_tile for frames, *_ in video_sizes]
        return MultiModalData(**counts)

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds."""
        own = {"system_prompt": self.system_prompt, "max_tokens": self.max_tokens}
        return {"processor_class": EagleProcessor.__name__, **own, **self.spec.to_dict()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS and name not in ("system_prompt", "max_tokens"):
            raise AttributeError(
                f"{name} is part of `spec`, which does not change: give it to a call, as in processor(..., {name}={value!r}), or when the "
                f"processor is loaded, as in from_pretrained(FOLDER, {name}={value!r})"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_costs": None}  # built again where it is used, for example in a DataLoader's process

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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "EagleProcessor":  # pyright: ignore[reportIncompatibleMethodOverride]
        """From a folder or hub name: the tokenizer, and settings from `processor_config.json` if Eagle wrote it, else from the model's
        `config.json` (released checkpoints). `kwargs` may replace single settings; TypeError for others."""
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        own = {key: kwargs.pop(key) for key in SETTINGS & set(kwargs)}
        others = {key: value for key, value in kwargs.items() if key not in NOT_OURS and not key.startswith("_from_")}
        refuse(others, {}, "from_pretrained", SETTINGS)
        written: dict[str, Any] = {}
        file = cached_file(pretrained_model_name_or_path, FILE, _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            written = {key: value for key, value in json.loads(Path(file).read_text()).items() if key in SETTINGS}
        if "tile_size" not in written:
            written |= visual_settings(EagleConfig.from_pretrained(pretrained_model_name_or_path, **hub))
        return cls(load_tokenizer(pretrained_model_name_or_path, **hub), **(written | own))


def visual_settings(config: EagleConfig) -> dict[str, Any]:
    """The fields of `VisualSpec` that a model's configuration decides."""
    tiles = config.max_dynamic_tiles if config.dynamic_image_size else 1
    return {
        "tile_size": config.tile_size,
        "tokens_per_tile": config.tokens_per_tile,
        "min_tiles": min(config.min_dynamic_tiles, tiles),
        "max_tiles": tiles,
        "thumbnail": config.use_thumbnail,
    }


def _open(image: Any, number: int) -> Any:
    """As `load_image`; the error of an image without a name says its number."""
    try:
        return load_image(image)
    except MediaError as error:
        if isinstance(image, str | PathLike) and not str(image).startswith("data:"):
            raise
        raise MediaError(f"image {number}: {error}") from error


class Eagle2_5_VLProcessor(EagleProcessor):
    """The name that released folders give their processor; `AutoProcessor` looks it up by that."""


class Eagle2_5_VLConfig(EagleConfig):
    """The name of the released configuration class; only there because processors are registered by configuration class."""


AutoProcessor.register(EagleConfig, EagleProcessor, exist_ok=True)
AutoProcessor.register(Eagle2_5_VLConfig, Eagle2_5_VLProcessor, exist_ok=True)
