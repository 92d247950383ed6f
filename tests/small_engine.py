"""A small program that answers as vLLM does, for tests of what stands before it; it waits as long as it is told."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from serving.engine import EngineState, Phase, free_port

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


class SmallEngine:
    """Where and how it is; `go_on` lets waiting answers come, `seen` is what it was asked, `text` what it says."""

    api_key: str | None = "the engine's key"
    restarts = 0
    picture_folder: Path | None = None

    def __init__(self, port: int | None = None, state: EngineState | None = None) -> None:
        self.base_url = f"http://127.0.0.1:{port or free_port()}"
        self.go_on = threading.Event()
        self.go_on.set()
        self.seen: list[dict[str, Any]] = []
        self.text = "Yes."
        self.finish_reason: str | None = "stop"
        self.known: set[str] = set()  # names of pictures that it keeps
        self.drops = 0  # connections that end before an answer, from the next question on
        self._state = state or EngineState(Phase.READY, "ready")

    def is_ready(self) -> bool:
        return self._state.phase is Phase.READY

    def state(self) -> EngineState:
        return self._state

    def log_tail(self) -> str:
        return ""


class _Server(ThreadingHTTPServer):
    # Socketserver's own 5 drops connections that come at once on a busy machine, and each waits seconds to come again.
    request_queue_size = 128


@contextmanager
def small_engine() -> Iterator[SmallEngine]:
    """One that listens, and answers every chat, streamed where that is asked."""
    server = _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    engine = SmallEngine(server.server_address[1])
    server.RequestHandlerClass = _handler(engine)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        engine.go_on.set()
        server.shutdown()
        server.server_close()


def picture_fault(body: dict[str, Any], known: set[str]) -> str | None:
    """What vLLM says of the first picture in a chat that it cannot open; of others it keeps the name in `known`."""
    for message in body.get("messages", []):  # an adapter that is to be loaded comes without
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] != "image_url":
                continue
            if part["image_url"] is None and part["uuid"] not in known:
                return "Cache miss for image at index 0 but data is not provided."
            url = (part["image_url"] or {"url": ""})["url"]
            if url.startswith("data:"):
                try:
                    Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).load()
                except OSError as error:
                    return f"Failed to load image: {error}"
            known.add(part["uuid"])
    return None


def _handler(engine: SmallEngine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._answer(b'{"data": [{"id": "joey"}]}', "application/json")
            else:
                self._answer(b"vllm:num_requests_running 0.0\n", "text/plain")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            engine.seen.append(body)
            if engine.drops:
                engine.drops -= 1
                self.close_connection = True
                return
            engine.go_on.wait(60)
            if (fault := picture_fault(body, engine.known)) is not None:
                content = json.dumps({"error": {"message": fault, "type": "BadRequestError", "code": 400}})
                self._answer(content.encode(), "application/json", 400)
                return
            message = {"role": "assistant", "content": engine.text}
            if not body.get("stream"):
                choice = {"index": 0, "message": message, "finish_reason": engine.finish_reason}
                content = json.dumps({"choices": [choice], "usage": USAGE}, separators=(",", ":"))
                self._answer(content.encode(), "application/json")
                return
            piece = {"index": 0, "delta": message, "finish_reason": engine.finish_reason}
            events: list[dict[str, Any]] = [{"choices": [piece]}]
            if (body.get("stream_options") or {}).get("include_usage"):
                events.append({"choices": [], "usage": USAGE})
            lines = [f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events]
            self._answer("".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream")

        def _answer(self, content: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
