"""What callers pass to the processor: settings of a call or of one medium, transformers' arguments, media of a batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from eagle_model.visual import VisualSpec

#: Settings that a call, or a single medium of it, may change; the others belong to the model.
CALL_SETTINGS = ("min_tiles", "max_tiles", "thumbnail", "strategy", "fps", "min_frames", "max_frames", "num_frames", "placement")
OF_VIDEOS = ("fps", "min_frames", "max_frames", "num_frames", "placement")
OF_IMAGES = ("max_tiles",)
SETTINGS = frozenset({field.name for field in fields(VisualSpec)} | {"system_prompt", "max_tokens"})
#: What `EagleProcessor.__call__` and a tokenised `apply_chat_template` take besides messages and media.
CALL_OPTIONS = frozenset(
    {
        *CALL_SETTINGS,
        "add_special_tokens",
        "continue_final_message",
        "max_length",
        "max_tokens",
        "padding",
        "padding_side",
        "return_assistant_tokens_mask",
        "return_labels",
        "return_mm_token_type_ids",
        "return_tensors",
    }
)
#: Arguments that transformers passes to processors, with the values that ask for what happens here anyway; so does None, False or nothing.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "chat_template_kwargs": (),
    "documents": (),
    "pad_to_multiple_of": (1,),
    "processor_kwargs": (),
    "return_attention_mask": (True,),
    "return_dict": (True,),
    "tools": (),
    # Nothing is cut: `max_length` is a budget that frames and tiles are reduced to.
    "truncation": (True, "longest_first", "only_first"),
}
#: What transformers passes to every `from_pretrained`, for remote code and for the model next to the processor.
NOT_OURS = frozenset({"attn_implementation", "code_revision", "device_map", "dtype", "torch_dtype", "trust_remote_code", "use_fast"})
#: Groups of arguments in which transformers' users nest settings.
NESTED = ("images_kwargs", "videos_kwargs", "text_kwargs", "common_kwargs", "processor_kwargs")


def refuse(given: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]], where: str, known: Iterable[str]) -> None:
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


def flat(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without transformers' groups (`images_kwargs={...}`)."""
    result = {name: value for name, value in kwargs.items() if name not in NESTED}
    for group in NESTED:
        for name, value in (kwargs.get(group) or {}).items():
            if name in result:
                raise TypeError(f"{name} is given twice, also in {group}")
            result[name] = value
    return result


def changed(spec: VisualSpec, settings: Mapping[str, Any]) -> VisualSpec:
    """The spec with `CALL_SETTINGS` of a call or a medium; None changes nothing."""
    changes = {name: value for name, value in settings.items() if value is not None}
    unknown = sorted(set(changes) - set(CALL_SETTINGS))
    if unknown:
        raise TypeError(f"no setting {unknown[0]} can be given for a call; these can: {', '.join(CALL_SETTINGS)}")
    if (frames := changes.pop("num_frames", None)) is not None:
        if changes.keys() & {"fps", "min_frames", "max_frames"}:
            raise ValueError("num_frames is given together with fps, min_frames or max_frames; give one or the other")
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"num_frames is {frames!r}; it must be a whole number of at least 1")
        changes |= {"min_frames": frames, "max_frames": frames}
    if isinstance(changes.get("max_frames"), int) and "min_frames" not in changes:
        changes["min_frames"] = min(spec.min_frames, changes["max_frames"])
    return spec.replace(**changes) if changes else spec


def own_settings(ref: Any, names: Sequence[str], kind: str) -> tuple[Any, dict[str, Any]]:
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
        own = {name: value for name, value in own.items() if value is not None}
        for name, value in own.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of an image is {value!r}; it must be a whole number of at least 1")
        return medium, own
    return rest, own


def per_row(media: Any, rows: int, single: bool, kind: str) -> list[Any]:
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


def budget(max_tokens: int | None, max_length: int | None) -> int | None:
    """The budget of a prompt; `max_length` is transformers' name for it. Raises ValueError when both are given and differ."""
    if max_tokens is not None and max_length is not None and max_tokens != max_length:
        raise ValueError(f"max_tokens is {max_tokens} and max_length {max_length}; the two mean the same, give one")
    return max_length if max_tokens is None else max_tokens


def wants_padding(padding: Any, return_tensors: str | None) -> bool:
    """Whether rows get one length: always as tensors, and as lists on request. Raises ValueError for another kind of padding."""
    if padding not in (None, False, True, "longest", "do_not_pad"):
        raise ValueError(f"padding={padding!r} isn't supported; rows are padded to the longest (True or 'longest') or not (False)")
    return return_tensors is not None or padding in (True, "longest")
