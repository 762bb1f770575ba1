"""A model class for VLMEvalKit, which passes a question as a list of `{"type": "image" | "video" | "text", "value": ...}`.

`register(supported_VLM, "Eagle", folder)` adds it to VLMEvalKit's table (`vlmeval.config.supported_VLM`).
"""

from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from eagle_model.integrations.answer import Answerer


class Eagle:
    """What VLMEvalKit calls: `generate(message, dataset)`, `generate_inner`, and `chat_inner` for several turns.

    model_path: an exported or released model. max_new_tokens and further generation options: for every question; the others are settings
    of the processor (fps, max_tokens, max_tiles, ...).
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    #: Videos are passed as files, so that frames are chosen and read here.
    VIDEO_LLM = True

    def __init__(self, model_path: str, *, device: str | None = None, dtype: str | None = None, max_new_tokens: int = 256, **settings: Any):
        self.answerer = Answerer(model_path, device=device, dtype=dtype, **settings)
        self.options = {"max_new_tokens": max_new_tokens}
        self.dump_image_func: Any = None

    def set_dump_image(self, dump_image_func: Any) -> None:
        """VLMEvalKit's function that writes the images of a row to files."""
        self.dump_image_func = dump_image_func

    def dump_image(self, line: Any, dataset: str) -> Any:
        return self.dump_image_func(line)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Questions are those of the benchmark."""
        return False

    def generate(self, message: str | Sequence[Any], dataset: str | None = None) -> str:
        """The answer to a question: a text, or texts and paths, or mappings with type and value."""
        items = [message] if isinstance(message, str) else message
        return self.generate_inner([_item(item) for item in items], dataset)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a question. Raises PromptError, MediaError, BudgetError, and ValueError for another type."""
        return self.answerer.answer([{"role": "user", "content": [_block(item) for item in message]}], self.options)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of several turns, each with role and content."""
        turns = [{"role": turn["role"], "content": [_block(_item(item)) for item in _items(turn["content"])]} for turn in message]
        return self.answerer.answer(turns, self.options)


def register(table: MutableMapping[str, Any], name: str, folder: str, **options: Any) -> None:
    """Add a model under `name` to VLMEvalKit's table. Raises ValueError for a name that is in it."""
    if name in table:
        raise ValueError(f"{name} is in the table already; choose another name")
    table[name] = partial(Eagle, model_path=folder, **options)


def _items(content: Any) -> Sequence[Any]:
    return [content] if isinstance(content, str | Mapping) else content


def _item(item: Any) -> Mapping[str, Any]:
    return item if isinstance(item, Mapping) else {"type": "text", "value": item}


def _block(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item["type"]
    if kind == "text":
        return {"type": "text", "text": item["value"]}
    if kind not in ("image", "video"):
        raise ValueError(f"a question holds {kind}; Eagle takes text, images and videos")
    return {"type": kind, kind: item["value"]}
