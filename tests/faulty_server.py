"""A real chat server on 127.0.0.1 that answers by rule, and fails in the ways that a test asks for."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "faulty"


@dataclass(frozen=True)
class Fault:
    """What is sent instead of an answer: a status, a body (JSON unless it is a text), a wait, or nothing at all."""

    status: int = 200
    body: str | dict[str, Any] = ""
    seconds: float = 0.0
    hangs_up: bool = False


Rule = Callable[[str, int], "str | Fault"]  # from the question and the number of the try (1, 2 ...)


@dataclass
class FaultyServer:
    """Requests are counted by question; `most_at_once` is how many were on the way together."""

    rule: Rule
    models: tuple[str, ...] = (MODEL,)
    key: str | None = None
    gather: int = 0  # so many requests wait for each other, the first time
    asked: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: Callable[[], None] = lambda: None

    def answer(self, body: dict[str, Any]) -> "str | Fault":
        question = "".join(part.get("text", "") for part in body["messages"][0]["content"])
        with self.lock:
            self.asked[question] += 1
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            tries = self.asked[question]
        try:
            started = time.monotonic()
            while self.most_at_once < self.gather and time.monotonic() < started + 20:
                time.sleep(0.01)
            return self.rule(question, tries)
        finally:
            with self.lock:
                self.at_once -= 1


@contextmanager
def faulty_server(rule: Rule, port: int = 0, **more: Any) -> Iterator[FaultyServer]:
    """A server that answers questions by `rule`, on a free port unless one is named."""
    server = FaultyServer(rule, **more)
    listening = _Listening(("127.0.0.1", port), type("Handler", (_Handler,), {"told": server}))
    server.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
    thread.start()

    def stop() -> None:
        listening.shutdown()
        listening.server_close()

    server.stop = stop
    try:
        yield server
    finally:
        stop()
        thread.join(10)


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    told: FaultyServer

    def do_GET(self) -> None:
        if self._is_allowed():
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.told.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._is_allowed():
            return
        answer = self.told.answer(body)
        if isinstance(answer, str):
            self._send(200, completion(answer))
            return
        time.sleep(answer.seconds)
        if not answer.hangs_up:
            self._send(answer.status, answer.body)

    def _is_allowed(self) -> bool:
        if self.told.key is None or self.headers["authorization"] == f"Bearer {self.told.key}":
            return True
        self._send(401, {"error": {"message": "this key is not known", "type": "invalid_request_error"}})
        return False

    def _send(self, status: int, body: str | dict[str, Any]) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("retry-after-ms", "5")  # so that a test does not wait for half a second and more
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            return  # the client did not wait

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what happens is told by the test."""


def completion(text: str | None) -> dict[str, Any]:
    """A chat completion that says `text`."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
