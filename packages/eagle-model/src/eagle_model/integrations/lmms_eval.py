"""lmms-eval plugin: `lmms-eval --model eagle --model_args pretrained=FOLDER --tasks TASKS`.

lmms-eval finds `manifest` through the entry point group `lmms_eval.models`. Tested with lmms-eval 0.7.3.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from eagle_model.integrations.answer import Answerer

manifest = ModelManifest("eagle", chat_class_path="eagle_model.integrations.lmms_eval.Eagle")


class Eagle(lmms):
    """pretrained: an exported or released model. device, dtype: as in torch; default: a GPU where there is one, and with several processes
    (`accelerate launch`), which share the questions, one for each. max_tokens, fps, max_tiles, num_frames, max_frames: of the processor,
    for every question. batch_size: 1, since a prompt may hold hundreds of frames."""

    is_simple = False

    def __init__(
        self, pretrained: str, device: str | None = None, dtype: str | None = None, batch_size: int | str = 1, **settings: Any
    ) -> None:
        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"batch_size is {batch_size}; questions are answered one by one, leave it at 1")
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.answerer = Answerer(pretrained, device=device, dtype=dtype, **settings)

    @property
    def device(self) -> torch.device:
        """Where lmms-eval's own collectives run."""
        return self.answerer.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in their order."""
        answers = []
        for request in tqdm(requests, desc="answers", disable=self._rank != 0):
            context, to_messages, options, doc, task, split = request.args
            answer = self.answerer.answer(content_blocks(to_messages(self.task_dict[task][split][doc])), options)
            self.cache_hook.add_partial("generate_until", (context, options), answer)
            answers.append(answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of the continuation of each request, and whether greedy decoding gives it."""
        results = []
        for request in tqdm(requests, desc="log-likelihoods", disable=self._rank != 0):
            context, to_target, to_visual, doc, task, split = request.args
            row = self.task_dict[task][split][doc]
            target = to_target if isinstance(to_target, str) else to_target(row)
            blocks = [_visual(medium) for medium in to_visual(row) or ()]
            messages = [{"role": "user", "content": [*blocks, {"type": "text", "text": context}]}]
            results.append(self.answerer.loglikelihood(messages, target))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request: the task gives the messages of the next round until it ends."""
        results = []
        for request in tqdm(requests, desc="answers", disable=self._rank != 0):
            _, to_messages, options, doc, task, split = request.args
            row = self.task_dict[task][split][doc]
            answers: list[str] = []
            messages, known = to_messages(row), None
            while True:
                answers.append(self.answerer.answer(content_blocks(messages), options))
                following = to_messages(row, round_idx=len(answers), previous_output=list(answers), previous_round_info=known)
                if not isinstance(following, tuple):
                    break
                messages, ended, _, known = following
                if ended:
                    break
            results.append(answers)
        return results


def content_blocks(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A task's messages with the media of lmms-eval (`url`, `start_time`, `end_time`) as content blocks; raises ValueError for audio."""
    result = []
    for message in messages:
        content = message["content"]
        blocks = []
        for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if block["type"] == "text":
                blocks.append({"type": "text", "text": block["text"]})
            elif block["type"] in ("image", "video"):
                rest = {name: block[name] for name in ("start_time", "end_time") if block.get(name) is not None}
                blocks.append(_visual(block["url"], block["type"]) | rest)
            else:
                raise ValueError(f"a message holds {block['type']}; Eagle takes text, images and videos")
        result.append({"role": message["role"], "content": blocks})
    return result


def _visual(medium: Any, kind: str | None = None) -> dict[str, Any]:
    """A medium as a block: images are Pillow, arrays or files, videos are files (or their type says so)."""
    suffix = medium.lower().rpartition(".")[2] if isinstance(medium, str) else ""
    kind = kind or ("video" if suffix in ("mp4", "mkv", "webm", "avi", "mov", "m4v", "pdf") else "image")
    return {"type": kind, kind: medium}
