"""The judge against a loopback server that answers, is busy, refuses, or replies something else."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eagle_train.config import JudgeConfig
from eagle_train.errors import EvaluationError
from eagle_train.evaluation.judge import Judge

SAME = ("What animal?", "a dog", "It is a dog.")
OTHER = ("What animal?", "a dog", "a cat")


@pytest.fixture
def server():
    """A server whose `replies` are used in order, the last one again and again; a reply is a text, or (state, text)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                made.requests.append((self.path, self.headers.get("Authorization"), body))
                reply = made.replies.pop(0) if len(made.replies) > 1 else made.replies[0]
            reply = reply(body) if callable(reply) else reply
            state, text = reply if isinstance(reply, tuple) else (200, json.dumps({"choices": [{"message": {"content": reply}}]}))
            self.send_response(state)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.requests, made.replies = [], [""]
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def judge_of(server, waits=None, **options):
    config = JudgeConfig(base_url=f"http://127.0.0.1:{server.server_port}/v1", model="small", **options)
    return Judge(config, wait=waits.append if waits is not None else lambda _: None)


def test_values_follow_the_verdicts_and_equal_requests_are_made_once(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server.replies = [lambda body: "Yes." if "It is a dog." in body["messages"][0]["content"] else "They differ, so no"]
    judge = judge_of(server, key_variable="MY_KEY")
    assert judge.values([SAME, OTHER, SAME, ("q", "e", " ")]) == [1.0, 0.0, 1.0, 0.0]
    assert judge.values([OTHER]) == [0.0]
    assert len(server.requests) == 2
    path, key, body = server.requests[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "small", 0)


def test_a_busy_server_gets_the_request_again(server):
    waits = []
    server.replies = [(503, "busy"), (429, "slow down"), (200, "not JSON"), (200, "{}"), "yes"]
    assert judge_of(server, waits).values([SAME]) == [1.0]
    assert waits == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("reply", "text", "requests"),
    [
        ((401, "wrong key"), "HTTP 401: wrong key", 1),
        ((500, "out of memory"), "HTTP 500: out of memory", 3),
        ("perhaps", "neither yes nor no", 1),
    ],
)
def test_what_the_judge_can_not_use_is_an_error_that_names_the_server(server, reply, text, requests):
    server.replies = [reply]
    with pytest.raises(EvaluationError, match=r"small at http://127\.0\.0\.1") as error:
        judge_of(server, attempts=3).values([SAME])
    assert text in str(error.value)
    assert len(server.requests) == requests


def test_a_server_that_is_not_there(server):
    port = server.server_port
    server.shutdown()
    server.server_close()
    config = JudgeConfig(base_url=f"http://127.0.0.1:{port}/v1", model="small", attempts=2)
    with pytest.raises(EvaluationError, match=r"OPENAI_API_KEY"):
        Judge(config, wait=lambda _: None).values([SAME])
