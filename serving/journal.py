"""Give every request an id and one line in the log, which holds no word and no picture unless that is asked for."""

import json
import logging
import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.metrics import Metrics
from serving.notes import Note

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LONGEST_PATH = 200
MOST_CONTENT = 64 * 2**10  # bytes of an answer, where contents are logged
DATA_URL = re.compile(r"data:([\w/+.-]*);base64,([A-Za-z0-9+/=]+)")

log = logging.getLogger("kangaroo.requests")


class Journal:
    """ASGI middleware, the outermost of ours: begins the note of a request, and writes it down at the end.

    Args:
        metrics: are told of every request.
        log_content: write down what was asked and answered too, pictures as their size only.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, log_content: bool = False) -> None:
        self.app = app
        self.metrics = metrics
        self.log_content = log_content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A page that is mounted changes the path on its way down.
        path = scope["path"]
        note = Note(request_id_of(scope))
        scope.setdefault("state", {})["note"] = note
        status = 0
        answer = bytearray()

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = note.request_id
                note.is_stream = headers.get("content-type", "").startswith("text/event-stream")
            elif message["type"] == "http.response.body" and (body := message.get("body", b"")):
                note.first_piece = note.first_piece or time.monotonic()
                note.sent_bytes += len(body)
                if self.log_content and len(answer) < MOST_CONTENT:
                    answer.extend(body)
            await send(message)

        try:
            with self.metrics.running(path):
                await self.app(scope, receive, send_noting)
        except Exception:
            # The framework answers it, outside of us.
            status = 500
            raise
        finally:
            note.let_go()
            seconds = time.monotonic() - note.started
            # No status: the client went away before there was one, which proxies log as 499.
            self.metrics.observe(scope, path, status or 499, seconds, note)
            if path.startswith("/v1/"):
                self._write(scope["method"], path, status or 499, seconds, note, bytes(answer))

    def _write(self, method: str, path: str, status: int, seconds: float, note: Note, answer: bytes) -> None:
        line: dict[str, object] = {
            "request_id": note.request_id,
            "method": method,
            "path": path[:LONGEST_PATH],
            "status": status,
            "ms": round(seconds * 1000, 1),
            "key": note.key.name if note.key else None,
            "prompt_tokens": note.prompt_tokens,
            "completion_tokens": note.completion_tokens,
            "pictures": note.pictures,
        }
        if self.log_content:
            line["asked"] = without_pictures((note.body or b"").decode(errors="replace"))
            line["answered"] = without_pictures(answer[:MOST_CONTENT].decode(errors="replace"))
        log.info(json.dumps(line))


def request_id_of(scope: Scope) -> str:
    """The client's own x-request-id where it is a plain one, else a new one."""
    given = HTTPConnection(scope).headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def without_pictures(text: str) -> str:
    """`text` with its data URLs cut down to what they are and how long."""
    return DATA_URL.sub(lambda url: f"data:{url[1]};base64,({len(url[2])} characters)", text)
