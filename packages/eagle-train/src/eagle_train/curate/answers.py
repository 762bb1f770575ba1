"""Answers of the endpoint on disk, and OpenAI batch files: requests written, results read."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from eagle_train.config import ConfigError


class NoAnswer(Exception):
    """A request without a usable answer. reason: of the ledger (refused, bad-answer, no-answer, bad-frames)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


_KEYS = {"key", "purpose", "content", "refusal", "finish", "input_tokens", "output_tokens"}


class Answers:
    """Answers on disk, one JSON line each, and in memory.

    A line that a kill cut is removed when the file is opened; one that is damaged is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            whole = 0
            with open(path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    try:
                        answer = json.loads(line)
                        if answer.keys() >= _KEYS:
                            self._known[answer.pop("key")] = answer
                    except (ValueError, AttributeError):
                        continue  # damaged, by a full disk for example: the request is sent again
            if whole < path.stat().st_size:
                os.truncate(path, whole)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._known.get(key)

    def add(self, key: str, purpose: str, answer: dict[str, Any]) -> None:
        line = json.dumps({"key": key, "purpose": purpose, **answer}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(line)
            self._known[key] = {"purpose": purpose, **answer}


class BatchFile:
    """Requests in the format of OpenAI's batch files, which vLLM's `run_batch` reads too; each key once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._keys: set[str] = set()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def add(self, key: str, body: dict[str, Any]) -> None:
        line = json.dumps({"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}, ensure_ascii=False)
        with self._lock:
            if key not in self._keys:
                self._keys.add(key)
                self.count += 1
                with open(self.path, "ab") as file:
                    file.write(line.encode("utf-8", "backslashreplace") + b"\n")


def read_batch(path: Path, answers: Answers) -> tuple[int, list[str]]:
    """Take the results of a batch into `answers`; returns how many, and the problems of the others.

    Raises ConfigError for a file that is not a batch result, naming its line.
    """
    taken = 0
    problems: list[str] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
            key, response = str(result["custom_id"]), result["response"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: is not a result of a batch (custom_id, response): {error}") from error
        if not isinstance(response, dict) or response.get("status_code") != 200:
            problems.append(f"{path}:{number}: {result.get('error') or response}"[:300])
            continue
        answers.add(key, "batch", completion_of(response.get("body")))
        taken += 1
    return taken, problems


def completion_of(body: Any) -> dict[str, Any]:
    """What is kept of a chat completion; of anything else, a completion without content."""
    choices = _mapping(body).get("choices")
    choice = _mapping(choices[0] if isinstance(choices, list) and choices else None)
    message, usage = _mapping(choice.get("message")), _mapping(_mapping(body).get("usage"))
    content, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    return {
        "content": content if isinstance(content, str) else None,
        "refusal": refusal if isinstance(refusal, str) else None,
        "finish": finish if isinstance(finish, str) else None,
        "input_tokens": _count(usage.get("prompt_tokens")),
        "output_tokens": _count(usage.get("completion_tokens")),
    }


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
