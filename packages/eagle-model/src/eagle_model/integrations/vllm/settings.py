"""What the plugin sets in vLLM's configuration, and the token budget of a request."""

from functools import lru_cache
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from eagle_model.integrations.vllm import NAME
from eagle_model.processor import EagleProcessor

#: Tokens kept free for the answer when a request does not limit it; at most a quarter of the context.
ANSWER_TOKENS = 1024


class EagleServing(VerifyAndUpdateConfig):
    """Selects the renderer and the video loader of the plugin for every way in which vLLM is started."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raises ValueError for a tokenizer mode that would render prompts in another way."""
        if model_config.tokenizer_mode not in ("auto", "hf", NAME):
            raise ValueError(f"--tokenizer-mode {model_config.tokenizer_mode} is not supported for Eagle; leave it out")
        model_config.tokenizer_mode = NAME
        if (multimodal := model_config.multimodal_config) is not None:
            video = {"video_backend": NAME, "num_frames": -1} | multimodal.media_io_kwargs.get("video", {})
            multimodal.media_io_kwargs = {**multimodal.media_io_kwargs, "video": video}


@lru_cache(maxsize=4)
def load_processor(model: str, revision: str | None) -> EagleProcessor:
    """The processor of a model folder or hub name; one object for renderer and media processor."""
    return EagleProcessor.from_pretrained(model, **({"revision": revision} if revision else {}))


def processor_of(model_config: Any) -> EagleProcessor:
    """The processor of the model that vLLM serves."""
    return load_processor(model_config.model, model_config.revision)


def prompt_budget(model_config: Any, answer_tokens: int | None = None) -> int:
    """Most tokens of a prompt: the context without `answer_tokens`, and at most what the model was trained with."""
    context = model_config.max_model_len
    room = answer_tokens or min(ANSWER_TOKENS, context // 4)
    trained = processor_of(model_config).max_tokens
    return min(context - room, context if trained is None else trained)
