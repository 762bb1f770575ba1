"""Questions to a language model behind any OpenAI-compatible endpoint, each answered once.

Every answer is a line of `answers.jsonl`, by the hash of its request (prompt, frames, model, schema), so that a run that was killed sends
nothing twice. Requests can also be written as OpenAI batch files, and their results read.
"""

import base64
import hashlib
import importlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from eagle_sampling import MediaError, probe, read_frames
from eagle_train.config import ConfigError

from .folder import CurateError, key_of
from .settings import EndpointConfig

ATTEMPTS = 3
"""Requests whose answers do not follow the schema are sent so many times."""
SILENCE = 20
"""So many requests in a row without an answer mean that the endpoint is down."""
AnswerT = TypeVar("AnswerT", bound=BaseModel)
Item = TypeVar("Item")
Value = TypeVar("Value")


class Schema(BaseModel):
    """The base of answers: closed, as strict JSON schemas must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shown(NamedTuple):
    """Frames that a request shows. content: hash of the video file; times: seconds from its first frame; side: longer side in pixels."""

    video: str
    content: str
    times: tuple[float, ...]
    side: int


class Request(NamedTuple, Generic[AnswerT]):
    """purpose: for the accounts. system, prompt: texts. shown: frames, or None. schema: of the answer."""

    purpose: str
    system: str
    prompt: str
    shown: Shown | None
    schema: type[AnswerT]


class NoAnswer(Exception):
    """A request without a usable answer. reason: of the ledger (refused, bad-answer, no-answer, bad-frames)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Pending(Exception):
    """The request was written to a batch file; its answer is not there yet."""


class Account(NamedTuple):
    """requests: sent; known: answered from the file; tokens of both kinds; cost: at the configured prices. Of this process."""

    requests: int = 0
    known: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


class Endpoint:
    """Sends requests, keeps answers and accounts. Used by many threads.

    batch: a file to write requests to, instead of sending them.
    """

    def __init__(self, settings: EndpointConfig, answers: Path, *, batch: Path | None = None) -> None:
        if not settings.model:
            raise ConfigError("annotate.endpoint.model is not given; name a model that the endpoint serves")
        self.settings = settings
        self.answers = Answers(answers)
        self.account = Account()
        self.batch = None if batch is None else BatchFile(batch)
        self._lock = threading.Lock()
        self._silent = 0
        self._client: Any = None

    def ask(self, request: Request[AnswerT]) -> AnswerT:
        """The answer, from the file or from the endpoint.

        Raises NoAnswer for this request alone, Pending when it was written to a batch file, CurateError when no request can be answered.
        """
        key = self.key(request)
        known = self.answers.get(key)
        if known is not None:
            try:
                value = _parsed(request, known)
            except NoAnswer as problem:
                if problem.reason == "refused":
                    raise
                # The result of a batch that does not follow the schema: the request is sent again.
            else:
                self._count(known=1)
                return value
        if self.batch is not None:
            self.batch.add(key, self._body(request))
            raise Pending
        for attempt in range(ATTEMPTS):
            answer = self._send(self._body(request))
            self._count(requests=1, input_tokens=answer["input_tokens"], output_tokens=answer["output_tokens"])
            try:
                value = _parsed(request, answer)
            except NoAnswer as problem:
                if problem.reason == "bad-answer" and attempt + 1 < ATTEMPTS:
                    continue
                if problem.reason == "refused":
                    self.answers.add(key, request.purpose, answer)
                raise
            self.answers.add(key, request.purpose, answer)
            return value
        raise AssertionError("unreachable")

    def key(self, request: Request[Any]) -> str:
        """The hash of a request. Frames count by the content of their file and their times."""
        shown = None if request.shown is None else [request.shown.content, list(request.shown.times), request.shown.side]
        settings = [self.settings.model, self.settings.temperature, self.settings.max_tokens]
        return key_of(settings, request.system, request.prompt, shown, request.schema.model_json_schema())

    def map(
        self, function: Callable[[Item], Value], items: Sequence[Item], progress: Callable[[int, int], None] | None = None
    ) -> list[Value]:
        """`function` of every item, in order, `concurrency` at a time. An exception ends it after the requests that are under way."""
        results: list[Any] = [None] * len(items)
        done = 0
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            queue = iter(enumerate(items))
            running: dict[Future[Value], int] = {}
            while True:
                while len(running) < 2 * self.settings.concurrency and (found := next(queue, None)) is not None:
                    running[pool.submit(function, found[1])] = found[0]
                if not running:
                    return results
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    try:
                        results[running.pop(future)] = future.result()
                    except BaseException:
                        pool.shutdown(wait=True, cancel_futures=True)
                        raise
                    done += 1
                    if progress is not None:
                        progress(done, len(items))

    def _body(self, request: Request[Any]) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if request.shown is not None:
            for time, data in zip(request.shown.times, jpegs(request.shown)):
                address = "data:image/jpeg;base64," + base64.b64encode(data).decode()
                content += [{"type": "text", "text": f"Frame at {time:.2f} s:"}, {"type": "image_url", "image_url": {"url": address}}]
        content.append({"type": "text", "text": request.prompt})
        schema = {"name": request.schema.__name__, "schema": request.schema.model_json_schema(), "strict": True}
        return {
            "model": self.settings.model,
            "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": content}],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        limit = self.settings.max_cost
        if limit is not None and self.account.cost >= limit:
            raise CurateError(f"annotate.endpoint.max_cost = {limit} is spent; every answer is kept: raise it and run again")
        openai, client = self._openai()
        try:
            response = client.chat.completions.create(**body)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise CurateError(
                f"{self.settings.base_url}: {_message(error)}; check annotate.endpoint (base_url, model) and the key in "
                f"{self.settings.api_key_env}"
            ) from error
        except openai.APIStatusError as error:
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                raise NoAnswer("refused-request", f"status {error.status_code}: {_message(error)}") from error
            self._no_answer(f"status {error.status_code} after {self.settings.retries + 1} attempts: {_message(error)}", error)
        except openai.APIError as error:  # no connection, no answer in time, or an answer that is not a completion
            self._no_answer(f"{type(error).__name__} after {self.settings.retries + 1} attempts: {_message(error)}", error)
        except ValueError as error:  # a body that is not JSON
            self._no_answer(f"the response is not JSON: {error}", error)
        with self._lock:
            self._silent = 0
        return _from_body(response.model_dump(mode="json") if hasattr(response, "model_dump") else {})

    def _no_answer(self, detail: str, error: Exception) -> NoReturn:
        with self._lock:
            self._silent += 1
            silent = self._silent
        if silent >= SILENCE:
            raise CurateError(
                f"{self.settings.base_url}: {silent} requests in a row got no answer, the last one: {detail}. Every answer so far is kept; "
                "check that the endpoint runs, and run again"
            ) from error
        raise NoAnswer("no-answer", detail) from error

    def _openai(self) -> tuple[Any, Any]:
        try:
            openai = importlib.import_module("openai")
        except ImportError:
            raise ConfigError("the endpoint needs the openai client: pip install 'eagle-train[curate]'") from None
        with self._lock:
            if self._client is None:
                settings = self.settings
                key = os.environ.get(settings.api_key_env) or "none"
                self._client = openai.OpenAI(
                    base_url=settings.base_url, api_key=key, max_retries=settings.retries, timeout=settings.timeout
                )
        return openai, self._client

    def _count(self, requests: int = 0, known: int = 0, input_tokens: int = 0, output_tokens: int = 0) -> None:
        cost = (input_tokens * self.settings.input_price + output_tokens * self.settings.output_price) / 1e6
        with self._lock:
            old = self.account
            self.account = Account(
                old.requests + requests,
                old.known + known,
                old.input_tokens + input_tokens,
                old.output_tokens + output_tokens,
                old.cost + cost,
            )


class Answers:
    """Answers on disk, one JSON line each, and in memory. A line that a kill cut is removed when the file is opened."""

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
                    answer = json.loads(line)
                    self._known[answer.pop("key")] = answer
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
            key, response = result["custom_id"], result["response"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: is not a result of a batch (custom_id, response): {error}") from error
        if response is None or response.get("status_code") != 200:
            problems.append(f"{path}:{number}: {result.get('error') or response}"[:300])
            continue
        answers.add(key, "batch", _from_body(response["body"]))
        taken += 1
    return taken, problems


def jpegs(shown: Shown) -> Iterator[bytes]:
    """The frames of a request as JPEG files. Raises NoAnswer("bad-frames")."""
    try:
        info = probe(shown.video)
        scale = min(1.0, shown.side / max(info.width, info.height))
        size = (max(round(info.width * scale), 1), max(round(info.height * scale), 1))
        origin = 0.0 if info.times is None else float(info.times.times()[0])
        frames = read_frames(shown.video, [origin + time for time in shown.times], size)
    except MediaError as error:
        raise NoAnswer("bad-frames", str(error)) from error
    for pixels in frames.pixels:
        yield jpeg(pixels)


def jpeg(pixels: NDArray[np.uint8], quality: int = 85) -> bytes:
    """uint8 [h, w, 3] as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _from_body(body: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a chat completion."""
    choices = body.get("choices") or [{}]
    message = choices[0].get("message") or {}
    usage = body.get("usage") or {}
    return {
        "content": message.get("content"),
        "refusal": message.get("refusal"),
        "finish": choices[0].get("finish_reason"),
        "input_tokens": int(usage.get("prompt_tokens") or 0),
        "output_tokens": int(usage.get("completion_tokens") or 0),
    }


def _parsed(request: Request[AnswerT], answer: dict[str, Any]) -> AnswerT:
    if answer["refusal"] or answer["finish"] == "content_filter":
        raise NoAnswer("refused", str(answer["refusal"] or "the endpoint's filter")[:300])
    if answer["finish"] == "length":
        raise NoAnswer("bad-answer", "the answer is longer than annotate.endpoint.max_tokens and was cut off")
    try:
        return request.schema.model_validate_json(answer["content"] or "")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise NoAnswer("bad-answer", f"{where}: {first['msg']}; the answer starts with {str(answer['content'])[:80]!r}") from error


def _message(error: Exception) -> str:
    return str(getattr(error, "message", error))[:300]


def digest_of(text: str) -> str:
    """A short hash of a text, for ids."""
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
