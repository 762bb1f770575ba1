"""Answers compared by a language model behind an OpenAI-compatible endpoint (`POST <base_url>/chat/completions`).

The request is plain HTTP, so any server of that form works (vLLM, llama.cpp, OpenAI) and nothing is installed for it. No request is made
unless `eval.judge` is configured.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from eagle_train.config import JudgeConfig
from eagle_train.errors import EvaluationError

PROMPT = """Compare an answer with the reference answer to a question.
Question: {question}
Reference answer: {expected}
Answer: {given}
Reply with one word: yes when the answer has the same meaning as the reference answer, no otherwise."""
_VERDICT = re.compile(r"\b(yes|no)\b")
_PASSING = (408, 409, 429, 500, 502, 503, 504)
"""HTTP states after which the request is repeated."""


class Judge:
    """Values of answers, 0 or 1. Requests run at once, `config.parallel` of them; equal requests are made once."""

    def __init__(self, config: JudgeConfig, *, wait: Callable[[float], None] = time.sleep) -> None:
        self.config, self.wait = config, wait
        self._known: dict[str, float] = {}

    def values(self, triples: Sequence[tuple[str, str, str]]) -> list[float]:
        """Values of (question, expected, given). An empty answer has the value 0 and costs no request.

        Raises EvaluationError when the endpoint cannot be reached, refuses, or replies neither yes nor no.
        """
        prompts = [PROMPT.format(question=q, expected=e, given=g) if g.strip() else "" for q, e, g in triples]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt and prompt not in self._known]
        with ThreadPoolExecutor(self.config.parallel) as pool:
            self._known.update(zip(new, pool.map(self._value, new), strict=True))
        return [self._known[prompt] if prompt else 0.0 for prompt in prompts]

    def _value(self, prompt: str) -> float:
        reply = self._reply(prompt)
        found = _VERDICT.findall(reply.casefold())
        if not found:
            raise EvaluationError(
                f"judge {self.config.model} at {self.config.base_url} replied {reply[:200]!r}, which has neither yes nor no; "
                "use a model that follows the instruction (eval.judge.model)"
            )
        return float(found[-1] == "yes")

    def _reply(self, prompt: str) -> str:
        config = self.config
        body = {"model": config.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": config.max_tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(config.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        address = config.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(config.attempts):
            try:
                with urllib.request.urlopen(request, timeout=config.timeout) as response:
                    return _text_of(json.load(response))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code not in _PASSING:
                    break
            except (OSError, ValueError) as error:  # no connection, timeout, a body that is not JSON or has no message
                problem = str(error) or type(error).__name__
            if attempt + 1 < config.attempts:
                self.wait(2.0**attempt)
        raise EvaluationError(
            f"judge {config.model} at {address}: {problem}; check eval.judge and that the server runs "  # pyright: ignore[reportPossiblyUnboundVariable]
            f"(the key is read from the environment variable {config.key_variable})"
        )


def _text_of(response: Any) -> str:
    """The text of a completion. Raises ValueError for another shape."""
    try:
        return str(response["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"a response without choices[0].message.content: {str(response)[:200]}") from error
