"""A chat completion server on the loopback interface: it answers by the name of the schema, and misbehaves when a test wants it to."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, str, int], Any]
"""(schema name, prompt, number of images) -> the object to answer with."""


class Stub:
    """misbehave: called with the number of a request (from 0); what it returns is sent instead of an answer: (status, body), "cut",
    "refuse", "sleep", "wrong", or None for an answer. `requests` are the bodies that were received, `most` the most at the same time.
    """

    def __init__(self, answer: Answer, misbehave: Callable[[int], Any] = lambda number: None) -> None:
        self.answer, self.misbehave = answer, misbehave
        self.requests: list[dict[str, Any]] = []
        self.schemas: Counter[str] = Counter()
        self.active = self.most = 0
        self.pause = 0.0
        self.address = ""
        self.lock = threading.Lock()

    def reply(self, body: dict[str, Any]) -> tuple[int, bytes]:
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
        wish = self.misbehave(number)
        if isinstance(wish, tuple):
            return wish[0], json.dumps(wish[1]).encode()
        if wish == "sleep":
            time.sleep(3)
        return 200, json.dumps(completion(body, self.answer, wish, self.schemas)).encode()


def completion(body: dict[str, Any], answer: Answer, wish: Any = None, schemas: Counter[str] | None = None) -> dict[str, Any]:
    """The chat completion of a request."""
    schema = body["response_format"]["json_schema"]["name"]
    content = body["messages"][1]["content"]
    images = sum(part["type"] == "image_url" for part in content)
    message: dict[str, Any] = {"role": "assistant", "content": json.dumps(answer(schema, content[-1]["text"], images))}
    finish = "stop"
    if wish == "refuse":
        message = {"role": "assistant", "content": None, "refusal": "I can't help with that."}
    elif wish == "cut":
        message["content"] = message["content"][: len(message["content"]) // 2]
    elif wish == "wrong":
        message["content"] = '{"unexpected": 1}'
    elif schemas is not None:
        schemas[schema] += 1
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100 + images, "completion_tokens": 10, "total_tokens": 110 + images},
    }


@contextmanager
def serving(answer: Answer, misbehave: Callable[[int], Any] = lambda number: None) -> Iterator[Stub]:
    """The server, at `stub.address`."""
    stub = Stub(answer, misbehave)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.active += 1
                stub.most = max(stub.most, stub.active)
            try:
                time.sleep(stub.pause)
                status, data = stub.reply(body)
            finally:
                with stub.lock:
                    stub.active -= 1
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has given up

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stub.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


def plain_answers(schema: str, prompt: str, images: int) -> Any:
    """Well-formed answers that pass the checks."""
    if schema == "Pairs":
        types = [line[2:].partition(":")[0] for line in prompt.splitlines() if line.startswith("- ")]
        return {
            "pairs": [
                {"type": kind, "question": f"What of kind {kind} is seen with {images} frames?", "answer": f"A thing of {kind}."}
                for kind in (types or ["story", "cause", "order"])
            ]
        }
    return {
        "Caption": {"title": "A part", "caption": f"{images} frames are shown."},
        "Context": {"anchor": "When the picture changes"},
        "Guess": {"answer": "No idea"},
        "Same": {"same": False},
        "Leak": {"leaks": False},
    }[schema]
