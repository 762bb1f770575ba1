"""Answers and log-likelihoods of one conversation: what the evaluation harnesses share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eagle_model.eagle import EagleForConditionalGeneration
from eagle_model.processor import EagleProcessor
from eagle_model.prompt import IM_END
from eagle_model.prompt.chat import flatten

#: What a harness may pass to `generate`; other names are refused.
GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "repetition_penalty")
_FROM_TASKS = {"max_gen_toks": "max_new_tokens"}


class Answerer:
    """A model with its processor. folder: an exported or released model. settings: of `EagleProcessor.process` (max_tokens, fps, ...).

    Frames are read by `eagle_sampling.read_frames`, for one conversation at a time, so memory does not grow with the data.
    """

    def __init__(self, folder: str | Path, *, device: str | None = None, dtype: str | None = None, **settings: Any) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype) if dtype else torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = EagleForConditionalGeneration.from_pretrained(folder, dtype=kind).to(self.device).eval()
        self.processor = EagleProcessor.from_pretrained(folder)
        self.settings = settings
        self.end = int(self.processor.tokenizer.convert_tokens_to_ids(IM_END))  # type: ignore[attr-defined]

    def answer(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None) -> str:
        """The answer to messages with content blocks. options: of generation, by the names that tasks use.

        Raises PromptError, MediaError, BudgetError, and ValueError for an unknown option.
        """
        options = {_FROM_TASKS.get(name, name): value for name, value in (options or {}).items() if value is not None}
        until = options.pop("until", [])
        if unknown := sorted(set(options) - set(GENERATION)):
            raise ValueError(f"generation has no option {unknown[0]}; known are {', '.join(GENERATION)} and until")
        options.setdefault("do_sample", options.get("temperature", 0) > 0)
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        inputs = self._inputs(messages, add_generation_prompt=True)
        with torch.inference_mode():
            made = self.model.generate(**inputs, pad_token_id=self.end, eos_token_id=self.end, **({"max_new_tokens": 256} | options))
        text = self.processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text.strip()

    def loglikelihood(self, messages: Sequence[Mapping[str, Any]], answer: str) -> tuple[float, bool]:
        """Sum of the log-probabilities of `answer` after the messages, and whether greedy decoding would give it."""
        inputs = self._inputs([*messages, {"role": "assistant", "content": answer}], continue_final_message=True)
        before = self._inputs(messages, add_generation_prompt=True)["input_ids"].shape[1]
        with torch.inference_mode():
            logprobs = self.model(**inputs).logits[0, before - 1 : -1].float().log_softmax(-1)
        targets = inputs["input_ids"][0, before:]
        return logprobs.gather(1, targets[:, None]).sum().item(), bool((logprobs.argmax(-1) == targets).all())

    def _inputs(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
        talk = flatten(messages)
        made = self.processor.process(talk.messages, talk.images, talk.videos, **options, **self.settings)
        inputs = {
            "input_ids": torch.from_numpy(made.input_ids)[None],
            "attention_mask": torch.ones(1, len(made.input_ids), dtype=torch.long),
        }
        if len(made.tiles):
            inputs["pixel_values"] = torch.from_numpy(made.tiles)
        return {name: value.to(self.device) for name, value in inputs.items()}
