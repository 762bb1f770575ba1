"""vLLM's renderer for Eagle: chat messages become token ids by `eagle_model.prompt`, not by a chat template.

Special tokens inside a user's text therefore stay text, and the ids are those of training.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image
from vllm.multimodal.media import MediaWithBytes
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt

from eagle_model.integrations.vllm.media import check_settings
from eagle_model.integrations.vllm.prompt import unexpanded_ids
from eagle_model.integrations.vllm.settings import processor_of, prompt_budget
from eagle_model.prompt import PromptError, encode, render, with_system
from eagle_model.prompt.chat import flatten
from eagle_model.prompt.render import place_media
from eagle_sampling import MediaError

#: Types of parts with a medium, and the field that it stands in (`input_image` is that of the Responses API).
_MEDIA_PARTS = {kind: kind for kind in ("image", "image_url", "image_pil", "video", "video_url")} | {"input_image": "image_url"}


class EagleRenderer(BaseRenderer[Any]):
    """Messages to ids, and the token budget of a request from its `max_tokens`."""

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        options = {"media_io_kwargs": params.media_io_kwargs, "mm_processor_kwargs": params.mm_processor_kwargs}
        with _media_errors():
            conversation, data, uuids = parse_chat_messages(messages, self.model_config, content_format="openai", **options)
        return conversation, self._prompt(messages, conversation, data, uuids, params)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        options = {"media_io_kwargs": params.media_io_kwargs, "mm_processor_kwargs": params.mm_processor_kwargs}
        with _media_errors():
            conversation, data, uuids = await parse_chat_messages_async(messages, self.model_config, content_format="openai", **options)
        return conversation, self._prompt(messages, conversation, data, uuids, params)

    def _prompt(self, messages: Sequence[Any], conversation: Sequence[Any], data: Any, uuids: Any, params: Any) -> Any:
        """Raises PromptError for messages, options or media that cannot be rendered."""
        options = params.get_apply_chat_template_kwargs()
        for name in ("tools", "documents", "chat_template"):
            if options.get(name):
                raise PromptError(f"{name} is not supported: Eagle has one prompt format, without tools")
        processor = processor_of(self.model_config)
        text, media = number_media(messages, conversation, data or {})
        text = with_system(text, processor.system_prompt)
        answer = options.get("add_generation_prompt", True)
        open_answer = bool(options.get("continue_final_message"))
        if not media:
            segments = render(text, add_generation_prompt=answer, continue_final_message=open_answer)
            return parse_dec_only_prompt(encode(segments, processor.costs.encoder).input_ids.tolist())
        place_media(text, len(media.get("image", ())), len(media.get("video", ())))
        ids = unexpanded_ids(text, processor.costs.encoder, add_generation_prompt=answer, continue_final_message=open_answer)
        prompt = parse_dec_only_prompt(ids)
        prompt["multi_modal_data"] = media  # type: ignore[typeddict-item]
        if uuids is not None:
            prompt["multi_modal_uuids"] = uuids  # type: ignore[typeddict-item]
        return prompt

    def process_for_engine(self, prompt: Any, arrival_time: float, **kwargs: Any) -> Any:
        return super().process_for_engine(self._with_budget(prompt, kwargs.get("tok_params")), arrival_time, **kwargs)

    async def process_for_engine_async(self, prompt: Any, arrival_time: float, **kwargs: Any) -> Any:
        return await super().process_for_engine_async(self._with_budget(prompt, kwargs.get("tok_params")), arrival_time, **kwargs)

    def _with_budget(self, prompt: Any, tok_params: Any) -> Any:
        """The prompt with the budget of its media: the context without the answer, unless the request gives `max_tokens` for it."""
        options = dict(prompt.get("mm_processor_kwargs") or {})
        if not prompt.get("multi_modal_data") or options.get("max_tokens") is not None:
            return prompt
        options["max_tokens"] = prompt_budget(self.model_config, getattr(tok_params, "max_output_tokens", 0))
        return {**prompt, "mm_processor_kwargs": options}


@contextmanager
def _media_errors() -> Iterator[None]:
    """vLLM reads media before the renderer sees them. Its errors for a decompression bomb, a local file where none is allowed and a `data:`
    address without base64 would become status 500; here they are wrong requests."""
    try:
        yield
    except RuntimeError as error:
        raise MediaError(f"a medium of the request can't be read: {error}") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"an image of the request is too large: {error}") from error


def number_media(
    messages: Sequence[Any], conversation: Sequence[Any], data: Mapping[str, Any]
) -> tuple[list[dict[str, str]], dict[str, list[Any]]]:
    """Messages as text with placeholders, and media in their order, with the settings that stand in their content parts.

    messages: as the request has them; conversation: as vLLM parsed them; data: media that vLLM read.
    Raises PromptError for a part without a medium, an unknown setting of a medium, tool calls, and what `flatten` refuses.
    """
    if unknown := sorted(set(data) - {"image", "video"}):
        raise PromptError(f"{unknown[0]} is not supported; a message holds text, images and videos")
    _check_parts(messages)
    counts = {"image": 0, "video": 0}
    turns = []
    for message in conversation:
        if message.get("tool_calls"):
            raise PromptError("tool calls are not supported: Eagle has one prompt format, without tools")
        content = message.get("content")
        blocks = []
        for part in content if isinstance(content, list) else [{"type": "text", "text": content or ""}]:
            kind = part["type"]
            if kind in counts:
                item = data[kind][counts[kind]]
                counts[kind] += 1
                settings = {name: value for name, value in part.items() if name not in ("type", "uuid")}
                if kind == "image":
                    if not isinstance(item, Image.Image | MediaWithBytes | None):
                        # vLLM passes `image_pil` on as it is; a text or mapping would name a file, which no option has allowed.
                        raise PromptError("image_pil takes a Pillow image, from Python; send an image as image_url")
                    settings.pop("detail", None)  # OpenAI's; what an image costs is decided by its size and the budget
                check_settings(kind, settings)
                blocks.append({"type": kind, kind: item, **settings})
            else:
                blocks.append({"type": "text", "text": part.get("text", "")})
        turns.append({"role": message["role"], "content": blocks})
    talk = flatten(turns)
    media = {kind: found for kind, found in (("image", talk.images), ("video", talk.videos)) if found}
    return talk.messages, media


def _check_parts(messages: Sequence[Any]) -> None:
    """vLLM leaves out parts that are empty; here they are an error."""
    for position, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in _MEDIA_PARTS and not part.get(_MEDIA_PARTS[kind]):
                raise PromptError(f"message {position} has a part of type {kind} without a medium in it")
