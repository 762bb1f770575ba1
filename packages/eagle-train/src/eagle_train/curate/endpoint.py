"""Questions to a language model behind any OpenAI-compatible endpoint, each answered once.

Every answer is a line of `answers.jsonl`, by the hash of its request (prompt, frames, model, schema), so that a run that was killed sends
nothing twice. Requests can also be written as OpenAI batch files.
"""

import base64
import hashlib
import importlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from eagle_train.config import ConfigError

from .answers import Answers, BatchFile, NoAnswer, completion_of
from .folder import CurateError, key_of
from .settings import EndpointConfig
from .shown import Shown, jpegs

ATTEMPTS = 3
"""Requests whose answers do not follow the schema are sent so many times."""
SILENCE = 20
"""So many requests in a row without an answer mean that the endpoint is down."""
NEVER = 3
"""So many when it has never given a sign of life: each one can take (retries + 1) x timeout."""
AnswerT = TypeVar("AnswerT", bound=BaseModel)
Item = TypeVar("Item")
Value = TypeVar("Value")


class Schema(BaseModel):
    """The base of answers: closed, as strict JSON schemas must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(NamedTuple, Generic[AnswerT]):
    """purpose: for the accounts. system, prompt: texts. shown: frames, or None. schema: of the answer."""

    purpose: str
    system: str
    prompt: str
    shown: Shown | None
    schema: type[AnswerT]


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

    batch: a file to write requests to, instead of sending them. frames: reads what a request shows, in this process or elsewhere.
    """

    def __init__(
        self,
        settings: EndpointConfig,
        answers: Path,
        *,
        batch: Path | None = None,
        frames: Callable[[Shown], Sequence[bytes]] = jpegs,
    ) -> None:
        if not settings.model:
            raise ConfigError("annotate.endpoint.model is not given; name a model that the endpoint serves")
        self.settings = settings
        self.answers = Answers(answers)
        self.frames = frames
        self.account = Account()
        self.batch = None if batch is None else BatchFile(batch)
        self._lock = threading.Lock()
        self._silent = 0
        self._alive = self._useful = False
        self._bad = 0
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
        body = self._body(request)
        for attempt in range(ATTEMPTS):
            try:
                value = self._once(key, request, body)
            except NoAnswer as problem:
                if problem.reason == "bad-answer" and attempt + 1 < ATTEMPTS:
                    continue
                if problem.reason != "refused":
                    self._useless(problem)
                raise
            self._useful = True
            return value
        raise AssertionError("unreachable")

    def _once(self, key: str, request: Request[AnswerT], body: dict[str, Any]) -> AnswerT:
        """One attempt. An answer that can be used, or a refusal, is kept."""
        answer = self._send(body)
        self._count(requests=1, input_tokens=answer["input_tokens"], output_tokens=answer["output_tokens"])
        try:
            value = _parsed(request, answer)
        except NoAnswer as problem:
            if problem.reason == "refused":
                self.answers.add(key, request.purpose, answer)
            raise
        self.answers.add(key, request.purpose, answer)
        return value

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
            for time, data in zip(request.shown.times, self.frames(request.shown)):
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
            self._alive = True
            self._no_answer(f"status {error.status_code} after {self.settings.retries + 1} attempts: {_message(error)}", error)
        except openai.APIError as error:  # no connection, no answer in time, or an answer that is not a completion
            self._no_answer(f"{type(error).__name__} after {self.settings.retries + 1} attempts: {_message(error)}", error)
        except ValueError as error:  # a body that is not JSON
            self._no_answer(f"the response is not JSON: {error}", error)
        with self._lock:
            self._silent, self._alive = 0, True
        return completion_of(response.model_dump(mode="json", warnings=False) if hasattr(response, "model_dump") else {})

    def _no_answer(self, detail: str, error: Exception) -> NoReturn:
        with self._lock:
            self._silent += 1
            silent = self._silent
        if silent >= (SILENCE if self._alive else NEVER):
            raise CurateError(
                f"{self.settings.base_url}: {silent} requests in a row got no answer, the last one: {detail}. Every answer so far is kept; "
                "check that the endpoint runs, and run again"
            ) from error
        raise NoAnswer("no-answer", detail) from error

    def _useless(self, problem: NoAnswer) -> None:
        """Raises CurateError when no request of this run had a usable answer: what is wrong is the model or the server, not a clip."""
        with self._lock:
            self._bad += 1
            bad = self._bad
        if bad >= SILENCE and not self._useful:
            raise CurateError(
                f"{self.settings.base_url}: none of {bad} requests had a usable answer, the last one: {problem}. Check that the model "
                f"{self.settings.model} sees images and that the server takes response_format json_schema"
            ) from problem

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


def _parsed(request: Request[AnswerT], answer: dict[str, Any]) -> AnswerT:
    if answer["refusal"] or answer["finish"] == "content_filter":
        raise NoAnswer("refused", str(answer["refusal"] or "the endpoint's filter")[:300])
    if answer["finish"] == "length":
        raise NoAnswer("bad-answer", "the answer is longer than annotate.endpoint.max_tokens and was cut off")
    if answer["content"] is None:
        raise NoAnswer("bad-answer", "the response is not a chat completion with a text (choices[0].message.content)")
    try:
        return request.schema.model_validate_json(answer["content"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise NoAnswer("bad-answer", f"{where}: {first['msg']}; the answer starts with {str(answer['content'])[:80]!r}") from error


def _message(error: Exception) -> str:
    return str(getattr(error, "message", error))[:300]


def digest_of(text: str) -> str:
    """A short hash of a text, for ids."""
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
