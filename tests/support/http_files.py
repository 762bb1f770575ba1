"""A folder served over HTTP on loopback, as object stores do: ranges of bytes, ETags and If-Match. It counts what it sends, and fails when
told to."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class FileServer:
    """Use as a context manager. sent: bytes of bodies by path; requests: (method, path). faults: by path, what the next requests get: a
    status, or `cut` (half of the body). etags: whether answers have one. ranges: whether ranges are sent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: dict[str, list[int | str]] = {}
        self.etags = self.ranges = True
        self.before: Callable[[str], None] = lambda path: None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_HEAD(self) -> None:
                server._answer(self, body=False)

            def do_GET(self) -> None:
                server._answer(self, body=True)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def forget(self) -> None:
        self.sent.clear()
        self.requests.clear()

    def _answer(self, request: Any, *, body: bool) -> None:
        path = unquote(request.path.partition("?")[0])
        self.requests.append((request.command, path))
        self.headers.append(dict(request.headers))
        self.before(path)
        fault = self.faults[path].pop(0) if self.faults.get(path) else None
        file = self.folder / path.lstrip("/")
        if isinstance(fault, int) or not file.is_file():
            return self._end(request, fault if isinstance(fault, int) else 404)
        content = file.read_bytes()
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        if request.headers.get("If-Match") not in (None, etag):
            return self._end(request, 412)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        status, headers = 200, {"Accept-Ranges": "bytes"} if self.ranges else {}
        if found and self.ranges:
            start, stop = int(found[1]), min(int(found[2] or len(content)) + 1, len(content))
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        if self.etags:
            headers["ETag"] = etag
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            content = content[: len(content) // 2] if fault == "cut" else content
            self.sent[path] += len(content)
            try:
                request.wfile.write(content)
            except ConnectionError:
                request.close_connection = True
        if fault == "cut":
            request.close_connection = True

    def _end(self, request: Any, status: int) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()
