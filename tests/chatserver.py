"""A chat completions server on this machine whose replies a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends; a `hold` is waited for first."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None


def completion(text: Any, finish: str | None = "stop") -> Reply:
    return Reply(body=json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode())


def refusal(status: int, message: str = "", **headers: str) -> Reply:
    return Reply(status, json.dumps({"error": {"message": message}}).encode(), headers)


YES, NO = completion("Verdict: yes"), completion("Verdict: no")


class Server:
    """A chat completions server on this machine; `answer` gets each question and the number of its call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer: Callable[[str, int], Reply] = lambda _question, _call: NO
        self.released = threading.Event()
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.calls.append((self.path, dict(self.headers), body))
                    call = len(outer.calls)
                reply = outer.answer(body["messages"][-1]["content"], call)
                if reply.hold:
                    reply.hold.wait(3)
                if outer.released.is_set():
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def script(self, *replies: Reply) -> None:
        self.answer = lambda _question, call: replies[call - 1]


@contextmanager
def serving() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.released.set()
    made.http.shutdown()
    thread.join()
    made.http.server_close()
