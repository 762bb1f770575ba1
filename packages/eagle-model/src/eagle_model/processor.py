"""The processor: messages with images, videos and documents in, ids and tiles out, by the prompt and visual pipeline of training."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.utils.hub import cached_file

from eagle_model.configuration import EagleConfig
from eagle_model.eagle import HUB_OPTIONS
from eagle_model.prompt import IGNORE_INDEX, CachedEncoder, Encoded, PromptError, Segment, encode, with_system
from eagle_model.prompt.chat import Conversation, chatml, flatten, parse_chatml
from eagle_model.prompt.costs import PromptCosts
from eagle_model.prompt.encode import TextEncoder
from eagle_model.tokenizer import CHAT_TEMPLATE, check_tokenizer, load_tokenizer
from eagle_model.visual import (
    SamplePlan,
    VideoRef,
    VisualSpec,
    as_video,
    load_image,
    measure_video,
    plan_sample,
    read_tiles,
    size_of,
)

FILE = "processor_config.json"
#: Settings that a call, or a single medium of it, may change; the others belong to the model.
CALL_SETTINGS = ("min_tiles", "max_tiles", "thumbnail", "strategy", "fps", "min_frames", "max_frames", "num_frames", "placement")
_OF_VIDEOS = ("fps", "min_frames", "max_frames", "num_frames", "placement")
_OF_IMAGES = ("max_tiles",)
SETTINGS = frozenset({field.name for field in fields(VisualSpec)} | {"system_prompt", "max_tokens"})
#: What a tokenised `apply_chat_template` passes on.
_CALL_OPTIONS = frozenset({"continue_final_message", "max_tokens", "padding_side", "return_labels", "return_tensors", *CALL_SETTINGS})
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
#: What transformers passes to every `from_pretrained`, for remote code and for the model next to the processor.
_NOT_OURS = frozenset({"attn_implementation", "code_revision", "device_map", "dtype", "torch_dtype", "trust_remote_code", "use_fast"})
#: Groups of arguments in which transformers' users nest settings.
_NESTED = ("images_kwargs", "videos_kwargs", "text_kwargs", "common_kwargs", "processor_kwargs")


class Processed(NamedTuple):
    """One conversation: input_ids, labels int64 [T]; tiles uint8 [N, s, s, 3] in the order of the prompt."""

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray


class RequestPlan(NamedTuple):
    """One conversation with the plan of its media: messages with the system message; opened images; videos; how its prompt reads.

    max_tokens: the budget that it was planned for, None without one.
    """

    messages: Sequence[Mapping[str, Any]]
    images: list[Any]
    videos: list[VideoRef]
    plan: SamplePlan
    spec: VisualSpec
    segments: list[Segment]
    max_tokens: int | None

    def encode(self, encoder: TextEncoder) -> Encoded:
        """input_ids and labels, int64 [T]."""
        return encode(self.segments, encoder)


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
        messages: Sequence[Mapping[str, Any]],
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
        spec = _changed(self.spec, settings)
        messages = with_system(messages, self.system_prompt)
        budget = self.max_tokens if max_tokens is None else max_tokens
        opened = [_own_settings(image, _OF_IMAGES, "image") for image in images]
        pictures = [load_image(image) for image, _ in opened]
        given = [_own_settings(video, _OF_VIDEOS, "video") for video in videos]
        refs = [as_video(video) for video, _ in given]
        fixed = self.costs.fixed_tokens(
            messages, len(pictures), len(refs), timed=[ref.timed for ref in refs], add_generation_prompt=add_generation_prompt
        )
        plan = plan_sample(
            fixed.text_tokens,
            [size_of(picture) for picture in pictures],
            [measure_video(ref) for ref in refs],
            spec,
            self.costs.frame_costs,
            max_tokens=budget,
            image_limits=[own.get("max_tiles", spec.max_tiles) for _, own in opened],
            video_specs=[_changed(spec, own) for _, own in given],
        )
        segments = plan.render(messages, spec, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        return RequestPlan(messages, pictures, refs, plan, spec, segments, budget)

    def process(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
        **settings: Any,
    ) -> Processed:
        """One conversation. Messages have text content with placeholders; images as `eagle_model.visual.load_image` takes them, videos and
        documents as `as_video` takes them.

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
        return Processed(*request.encode(self.costs.encoder), tiles)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        *,
        messages: Any = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
        padding_side: str = "left",
        return_labels: bool = False,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one conversation or a batch of them: input_ids, attention_mask [B, L], pixel_values uint8 [N, s, s, 3].

        text or messages: a question, a ChatML string, a list of messages (content as text or as blocks), or a list of any of these.
        images, videos: for one conversation a list (or a single one); for a batch a list of lists, or of one medium for each text. Media
        inside content blocks are not given again. add_generation_prompt: whether an answer is wanted (default: if the last message is not
        an assistant's). continue_final_message: leave the last message, an assistant's, open, so that generation continues it.
        max_tokens and `CALL_SETTINGS` (max_tiles, fps, num_frames, ...): as in `process`, also inside `images_kwargs` and
        `videos_kwargs`. return_labels: add labels [B, L] (-100 where nothing is learned). return_tensors: "pt" or "np".

        Raises what `process` raises, and TypeError or ValueError for other arguments, except those of transformers' processors that ask
        for what happens anyway (`padding=True`).
        """
        kwargs = _flat(kwargs)
        settings = {name: kwargs.pop(name) for name in CALL_SETTINGS if name in kwargs}
        _refuse(kwargs, _HARMLESS, "the processor", _CALL_OPTIONS)
        if isinstance(images, str) and messages is None and text is not None and not isinstance(text, str | list | tuple):
            raise TypeError("images come first: call the processor as processor(images, text), or with text=... and images=...")
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
            processed.append(
                self.process(
                    talk.messages,
                    talk.images,
                    talk.videos,
                    add_generation_prompt=generate,
                    continue_final_message=continue_final_message,
                    max_tokens=max_tokens,
                    **settings,
                )
            )
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
        model inputs, media taken from the content blocks; then `kwargs` may be `continue_final_message`, `max_tokens`, `padding_side`,
        `return_labels`, `return_tensors` and `CALL_SETTINGS`. The format is Eagle's: another `chat_template`, `tools`, and
        `continue_final_message` without tokenize are refused."""
        if chat_template is not None and chat_template != self.chat_template:
            raise ValueError("Eagle has one prompt format; messages can't be rendered with another chat template")
        kwargs = _flat(kwargs)
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
        own = {"system_prompt": self.system_prompt, "max_tokens": self.max_tokens}
        return {"processor_class": EagleProcessor.__name__, **own, **self.spec.to_dict()}

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
        others = {key: value for key, value in kwargs.items() if key not in _NOT_OURS and not key.startswith("_from_")}
        _refuse(others, {}, "from_pretrained", SETTINGS)
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


def _refuse(given: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]], where: str, known: Iterable[str]) -> None:
    """Raise TypeError for arguments that don't exist, ValueError for transformers' where they ask for what isn't supported."""
    for name, value in given.items():
        if name in harmless:
            if value and value not in harmless[name]:
                raise ValueError(f"{where}: {name}={value!r} isn't supported")
        elif name in SETTINGS and name not in CALL_SETTINGS:
            raise TypeError(
                f"{where} has no argument {name}: the model was trained with it; it is given when the processor is made or loaded"
            )
        elif value is not None:
            near = get_close_matches(name, known, 1)
            raise TypeError(f"{where} has no argument {name}{f'; is {near[0]} meant?' if near else ''}")


def _flat(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without transformers' groups (`images_kwargs={...}`)."""
    flat = {name: value for name, value in kwargs.items() if name not in _NESTED}
    for group in _NESTED:
        for name, value in (kwargs.get(group) or {}).items():
            if name in flat:
                raise TypeError(f"{name} is given twice, also in {group}")
            flat[name] = value
    return flat


def _changed(spec: VisualSpec, settings: Mapping[str, Any]) -> VisualSpec:
    """The spec with `CALL_SETTINGS` of a call or a medium; None changes nothing."""
    changes = {name: value for name, value in settings.items() if value is not None}
    unknown = sorted(set(changes) - set(CALL_SETTINGS))
    if unknown:
        raise TypeError(f"no setting {unknown[0]} can be given for a call; these can: {', '.join(CALL_SETTINGS)}")
    if (frames := changes.pop("num_frames", None)) is not None:
        if changes.keys() & {"fps", "min_frames", "max_frames"}:
            raise ValueError("num_frames is given together with fps, min_frames or max_frames; give one or the other")
        changes |= {"min_frames": frames, "max_frames": frames}
    if "max_frames" in changes and "min_frames" not in changes:
        changes["min_frames"] = min(spec.min_frames, changes["max_frames"])
    return spec.replace(**changes) if changes else spec


def _own_settings(ref: Any, names: Sequence[str], kind: str) -> tuple[Any, dict[str, Any]]:
    """A medium without the settings that its mapping gives for it, and these settings."""
    if not isinstance(ref, Mapping) or "lmdb_file" in ref:
        return ref, {}
    rest = dict(ref)
    # The rate of frames that are decoded already is a fact about them, not a wish.
    decoded = kind == "video" and not isinstance(rest.get("video", rest.get("path")), str | Path)
    own = {name: rest.pop(name) for name in names if name in rest and not (decoded and name == "fps")}
    if "nframes" in rest and kind == "video":  # the spelling of Qwen-VL's users
        own["num_frames"] = rest.pop("nframes")
    if kind == "image":
        medium = next((rest.pop(name) for name in ("image", "path") if rest.get(name) is not None), None)
        if medium is None or rest:
            raise ValueError(f"an image given as a mapping has 'image' and, optionally, {', '.join(names)}; got {sorted(ref)}")
        return medium, own
    return rest, own


def _per_row(media: Any, rows: int, single: bool, kind: str) -> list[Any]:
    if media is None:
        return [None] * rows
    if single:
        return [list(media) if isinstance(media, list | tuple) else [media]]
    if not isinstance(media, list | tuple) or len(media) != rows:
        raise ValueError(f"a batch of {rows} conversations needs {kind} as {rows} lists, one for each (or one medium for each)")
    if all(row is None or isinstance(row, list | tuple) for row in media):
        return list(media)
    if any(isinstance(row, list | tuple) for row in media):
        raise ValueError(f"{kind} of a batch are lists in some conversations and single media in others; give lists everywhere")
    return [None if row is None else [row] for row in media]


def _with_media(talk: Conversation, images: Any, videos: Any) -> Conversation:
    for kind, own, given in (("images", talk.images, images), ("videos", talk.videos, videos)):
        if not own or own[0] is None:
            continue
        if given:
            raise PromptError(f"{kind} stand in the content blocks and are given as an argument too; give them once")
    return talk._replace(images=_placed("image", talk.images, images), videos=_placed("video", talk.videos, videos))


def _placed(kind: str, own: list[Any], given: Any) -> list[Any]:
    """The media of a conversation: those in its blocks, or those that are given for blocks that only mark their places."""
    if own and own[0] is not None:
        return own
    media = list(given or ())
    if own and len(own) != len(media):
        raise PromptError(f"{len(own)} {kind} blocks have no {kind} in them, and {len(media)} {kind}s are given in {kind}s; give as many")
    return media


class Eagle2_5_VLProcessor(EagleProcessor):
    """The name that released folders give their processor; `AutoProcessor` looks it up by that."""


class Eagle2_5_VLConfig(EagleConfig):
    """The name of the released configuration class; only there because processors are registered by configuration class."""


AutoProcessor.register(EagleConfig, EagleProcessor, exist_ok=True)
AutoProcessor.register(Eagle2_5_VLConfig, Eagle2_5_VLProcessor, exist_ok=True)
